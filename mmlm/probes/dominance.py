"""Text dominance: how much attention generated tokens pay to the text and to the image.

Paper: "When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models",
arXiv 2508.10552 (2025).
Sources read: a third-party transcription of the paper's equations 1 to 4; the paper's body was not
read and no authors' code is known.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.layout import ANSWER, PROMPT, TokenLayout
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import check_layers, read_numbers
from mmlm.engine.stages import measured_layers
from mmlm.probes.layer_probe import check_rows, short

__all__ = ["COLUMNS", "TextDominance", "key_marks", "masses"]

#: Groups of keys whose attention is added up. ``first`` lies within one of the others.
COLUMNS = ("text", "visual", "instruction", "first")


def key_marks(layout: TokenLayout) -> Float[Tensor, "B N 4"]:
    """Which key belongs to which of :data:`COLUMNS`: 1 or 0.

    ``visual``: positions filled with image features, row ends among them. ``text``: every other
    position of the prompt, tokens that only frame an image included. ``instruction``: text behind
    the row's last image but its frames: the question, and what the chat template puts behind it.
    ``first``: the first real position. Padding and generated tokens are in none.
    """
    text, index = layout.seg == PROMPT, torch.arange(layout.length, device=layout.seg.device)
    behind = (index > layout.last_image_end()[:, None]) & layout.has_image()[:, None]
    first = index == layout.real.long().argmax(-1)[:, None]
    groups = (text, layout.visual, text & behind & ~layout.frame, first)
    return torch.stack(groups, dim=-1).float()


def masses(
    a: Float[Tensor, "B H R K"], counted: Bool[Tensor, "B R"] | None, marks: Float[Tensor, "B N C"]
) -> Float[Tensor, "B H C"]:
    """Attention of the counted rows (None: all) on each group of keys, summed over the rows.

    Keys behind the N marked ones, i.e. generated tokens, are left out.
    """
    if a.shape[2] == 1 and counted is None:  # a decoding step: nothing is copied
        return torch.bmm(a[:, :, 0, : marks.shape[1]], marks)
    given = a if counted is None else a * counted[:, None, :, None]
    return torch.bmm(given.sum(2)[:, :, : marks.shape[1]], marks)


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        n_layers: Decoder layers of the model.
        layers: Those that are measured.
        marks: fp32 [B, N, 4]; see :func:`key_marks`.
        answer: Bool [B, N]; positions of a given answer, which are the queries of that mode.
        seen: Positions so far, by layer.
        prompt: fp32 [B, H, 4] by layer; of the prompt's last row.
        steps: The same by layer for every generated token that was fed back, or for each chunk of
            a given answer.
    """

    n_layers: int
    layers: tuple[int, ...]
    marks: Tensor
    answer: Tensor
    seen: dict[int, int] = field(default_factory=dict)
    prompt: dict[int, Tensor] = field(default_factory=dict)
    steps: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class TextDominance(Method):
    """Measures how much attention new tokens pay to the text and to the image of a prompt.

    Idea:
        If text keys get far more attention per token than visual ones, the answer comes from the
        language model rather than from the image.
    Paper:
        "When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models",
        arXiv 2508.10552, 2025.
    Equations:
        (1) ``A_T = sum over queries and text keys of a(q, k)``, and A_O over visual keys, with a
        the mean over heads: :func:`masses`.
        (2) - (4) MDI, AEI_T and AEI_O are ratios of what is recorded here:
        ``benchmarks.text_dominance``.
    Acts at:
        ``weights`` (looks, behind the edits of all other methods) of every token that was
        generated and fed back, in the chosen layers.
    Cost:
        No extra forward. Per token and layer one row of attention weights is computed again.
        Memory: 4 numbers per head, layer and token, and 4 per position of the prompt.
    Parameters:
        layers: Decoder layers, each >= 0. None: the first two, the two central and the last two
            (paper): :func:`mmlm.engine.stages.stage_layers`.
        queries: "generated": tokens that the model itself wrote, the only queries that are
            comparable with the paper (default). "answer": positions that a given layout marks as
            answer, for an answer that stands in the prompt (teacher forcing).
    Shapes:
        B rows, H query heads, R query rows, K keys, N prompt positions, C groups of keys.
    State:
        Per prompt: which keys are what, and the sums.
    Differs:
        A_T and A_O are not divided by their sum: no ratio changes, and a fall of MDI that comes
        from fewer visual tokens alone can be told from one with more attention on them.
        The last token of an answer is never fed back, so it is no query. An answer of one token
        has no query at all: then the prompt's last row is recorded, and ``queries_from`` says so.
    Limits:
        Beam search is refused. Only an image's own features count as visual. Text of a second
        turn on a kept cache counts neither as key nor as query. A sliding window that has passed
        the image leaves A_O at 0.

    Raises:
        ValueError: for layers that the model does not have, or an unknown kind of queries.

    Example:
        with TextDominance()(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title=(
            "When Language Overrules: Revealing Text Dominance in Multimodal Large Language Models"
        ),
        arxiv="2508.10552",
        year=2025,
        venue="arXiv",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})
    measures: ClassVar[str] = "text_dominance"

    layers: tuple[int, ...] | None = None
    queries: Literal["generated", "answer"] = "generated"

    def __post_init__(self) -> None:
        self._check_choice("queries", ("generated", "answer"))
        if self.layers is not None:
            chosen = read_numbers("TextDominance", "layers", self.layers)
            object.__setattr__(self, "layers", chosen)

    def neutral(self) -> TextDominance:
        """Itself: the model is unchanged under every setting."""
        return self

    @property
    def rows(self) -> Rows:
        """The last row of each pass; for a given answer the text behind the last image."""
        return "last" if self.queries == "generated" else "tail"

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The chosen layers."""
        return layer in (self.layers or measured_layers(anatomy.n_layers))

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Runs wherever attention rows can be seen."""
        check_layers("TextDominance", self.layers or (), anatomy.n_layers)
        return []

    def begin(self, prompt: Prompt) -> _State:
        """Notes which key is what."""
        layout, n_layers = prompt.layout, prompt.anatomy.n_layers
        layers = self.layers or measured_layers(n_layers)
        return _State(n_layers, layers, key_marks(layout), layout.seg == ANSWER)

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Adds a row up, or those of a given answer; changes nothing."""
        keys, before = a.shape[-1], state.seen.get(layer)
        state.seen[layer] = keys
        steps = state.steps.setdefault(layer, [])
        if self.queries == "answer":
            if keys == state.answer.shape[1]:
                steps.append(masses(a, state.answer.gather(1, rows), state.marks))
        elif before is None:
            state.prompt[layer] = masses(a, None, state.marks)
        elif keys == before + 1:  # several new positions are another turn's text
            steps.append(masses(a, None, state.marks))
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row, in plain JSON; ``benchmarks.text_dominance`` reads it.

        Returns:
            Dictionaries with ``layers``, ``n_layers``, ``queries`` (number of rows in the sums),
            ``queries_from`` ("generated", "answer", or "last prompt row" if there is no generated
            row), ``n_text``, ``n_visual``, ``n_instruction`` (keys of each group), ``first`` (the
            group of the first token), and per layer the sums ``text``, ``visual``,
            ``instruction``, ``first_token``.

        Raises:
            ValueError: If ``tokens`` are not one number per row.
        """
        rows = state.marks.shape[0]
        check_rows(tokens, rows)
        sizes = state.marks.sum(1).long().tolist()
        first = (state.marks[..., :1] * state.marks[..., 3:]).sum((1, 2)).bool().tolist()
        sums, counts, sources = self._sums(state, tokens)
        return [
            {
                "layers": list(state.layers),
                "n_layers": state.n_layers,
                "queries": counts[row],
                "queries_from": sources[row],
                "n_text": sizes[row][0],
                "n_visual": sizes[row][1],
                "n_instruction": sizes[row][2],
                "first": "text" if first[row] else "visual",
                **{
                    name: [short(x) for x in sums[:, row, column].tolist()]
                    for column, name in enumerate((*COLUMNS[:3], "first_token"))
                },
            }
            for row in range(rows)
        ]

    def _sums(
        self, state: _State, tokens: Sequence[int] | None
    ) -> tuple[Tensor, list[int], list[str]]:
        """Sums [layers, B, 4], the number of queries behind them by row, and what those are."""
        rows = state.marks.shape[0]
        if self.queries == "answer":
            chunks = [_read(state.steps.get(layer, []), state).sum(0) for layer in state.layers]
            return torch.stack(chunks), state.answer.sum(-1).tolist(), ["answer"] * rows
        ran = min(len(state.steps[layer]) for layer in state.layers)
        # What was generated last was never fed back.
        counts = [ran] * rows if tokens is None else [min(n - 1, ran) for n in tokens]
        used = torch.tensor(counts) > torch.arange(ran)[:, None]
        steps = [
            torch.cat(
                [
                    _read(state.steps[layer][:ran], state) * used[..., None],
                    _read([state.prompt[layer]], state) * ~used.any(0)[:, None],
                ]
            ).sum(0)
            for layer in state.layers
        ]
        sources = ["generated" if n > 0 else "last prompt row" for n in counts]
        return torch.stack(steps), [max(n, 1) for n in counts], sources


def _read(steps: list[Tensor], state: _State) -> Tensor:
    """What was kept of one layer, as means over heads in double precision: [steps, B, 4]."""
    if not steps:
        return torch.zeros(0, state.marks.shape[0], len(COLUMNS), dtype=torch.float64)
    return torch.stack(steps).cpu().double().mean(2)
