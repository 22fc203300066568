"""Attention sinks: keys that take attention from most queries, in the prompt and in the answer.

Paper: "When Attention Sink Emerges in Language Models: An Empirical View", Gu et al., ICLR 2025,
arXiv 2410.10781. Sources read: the authors' code (sail-sg/Attention-Sink, commit af49727, MIT) and
the abstract; the paper's tables were not available. The form relative to an even share, regions and
places in pictures are ours: the paper is about text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.column_means import Columns, sink_percent, sink_set
from mmlm.engine.method import Paper, Prompt, Rows
from mmlm.probes.layer_probe import LayerProbe, check_rows, check_shown, short

__all__ = ["REGIONS", "AttentionSinks", "agreement"]

REGIONS = ("first", "text", "image")
"""The first token; text and image without it."""
_RATED = 10
_LEVELS = (0.1, 0.2, 0.3)
_OFTEN = 0.25


@dataclass(eq=False)
class _State:
    """What is kept for one prompt.

    Attributes:
        layers: Those that are measured.
        real: Bool [B, n]; columns of the prompt that hold a token.
        img: int64 [B, n]; image of each column, -1 outside.
        number: int64 [B, n]; which position of its image it is.
        counts: Positions of each image that were given, by row.
        prompt: Sums over the prompt's rows by layer, of "prompt".
        read: Rows of the prompt that were added, by layer.
        steps: Per layer the row of every token that was fed back, [B, H, K], of "generated".
        seen: Positions so far, by layer.
    """

    layers: tuple[int, ...]
    real: Tensor
    img: Tensor
    number: Tensor
    counts: list[list[int]]
    prompt: dict[int, Columns] = field(default_factory=dict)
    read: dict[int, int] = field(default_factory=dict)
    steps: dict[int, list[Tensor]] = field(default_factory=dict)
    seen: dict[int, int] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class AttentionSinks(LayerProbe):
    """Finds the keys that most queries look at whatever they ask, among text and in pictures.

    Idea:
        Some tokens get attention from every query, the first one above all, and carry little. In a
        picture such places look as if the model had looked there.
    Paper:
        "When Attention Sink Emerges in Language Models: An Empirical View", arXiv 2410.10781,
        ICLR 2025.
    Equations:
        ``alpha_k = sum_{i >= k} A(i, k) / (T - k)``, the mean over the queries that can see key k;
        the rate is the share of layers and heads with ``alpha_k > eps`` (paper).
        ``baseline_k``: alpha_k of even attention; sinks are keys with ``alpha_k > eps`` or
        ``alpha_k > factor * baseline_k`` that at least min_queries queries can see (ours):
        :mod:`mmlm.engine.column_means`.
    Acts at:
        ``weights`` (looks, behind the edits of all other methods) of all rows of the prompt, or of
        the last row of each pass.
    Cost:
        No extra forward. "prompt": all attention rows of the prompt are computed a second time, in
        chunks; nothing per token. Memory: H + 2 numbers per layer and position. "generated": per
        token and layer one row, which is kept, because it is known at the end only which tokens
        belong to a row's answer.
    Parameters:
        queries: "prompt": the prompt's own positions (paper; default). "generated": tokens that
            the model wrote, for a sink of the prompt need not be one of the answer. The last token
            is no query: it is never fed back.
        eps: Least mean weight of a sink, in (0, 1). Default 0.3 (paper). Means something for
            prompts of about 64 tokens or more: noise over 12 tokens gives the first one 0.26.
        factor: Least multiple of an even share, > 1. Default 10 (ours): a single one of hundreds
            of image tokens hardly reaches eps.
        min_queries: Least number of queries that can see a sink, >= 1. Default 8 (ours): a mean of
            few queries is noise. So a causal prompt's last 7 keys are no sinks.
        layers: Decoder layers, each >= 0. None: all.
    Shapes:
        B rows, H query heads, R query rows, K keys, T queries, n columns of the prompt.
    State:
        Per prompt: which column belongs to which image, and sums over queries.
    Differs:
        Queries that can see a key are counted, not taken from its number: with windows, and with
        images that see themselves, they are others than T - k. Padding is no key and no query.
        The authors cut texts to 64 tokens; here T is the prompt's length, and recorded.
    Limits:
        Beam search is refused. Text of a second turn on a kept cache is neither key nor query; of
        several answers on it the last is measured. Where a picture comes first, its first token is
        counted as the first token and not as image.

    Raises:
        ValueError: for a parameter out of range, a layer that the model does not have, or a prompt
            of fewer than min_queries + 1 tokens.

    Example:
        with AttentionSinks()(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title="When Attention Sink Emerges in Language Models: An Empirical View",
        arxiv="2410.10781",
        year=2024,
        venue="ICLR 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})
    measures: ClassVar[str] = "attention_sinks"

    queries: Literal["prompt", "generated"] = "prompt"
    eps: float = 0.3
    factor: float = 10.0
    min_queries: int = 8

    def __post_init__(self) -> None:
        self._check_choice("queries", ("prompt", "generated"))
        self._check_number("eps", above=0, at_most=1)
        if self.eps == 1:
            raise ValueError("AttentionSinks: eps must be below 1, got 1: no mean is above it.")
        self._check_number("factor", above=1)
        self._check_integer("min_queries", at_least=1)
        super().__post_init__()

    @property
    def rows(self) -> Rows:
        """All rows of the prompt, or the last one of each pass."""
        return "all" if self.queries == "prompt" else "last"

    def acts_now(self, state: _State, layer: int) -> bool:
        """Once the prompt is read, no row of it comes any more."""
        return self.queries == "generated" or state.read.get(layer, 0) < state.real.shape[1]

    def begin(self, prompt: Prompt) -> _State:
        """Notes which column belongs to which image, also where some of it does not enter."""
        full, layout = prompt.full_layout, prompt.layout
        shortest = int(layout.real.sum(-1).min())
        if self.queries == "prompt" and shortest <= self.min_queries:
            raise ValueError(
                f"AttentionSinks: the prompt has {shortest} tokens and min_queries is "
                f"{self.min_queries}; at least {self.min_queries + 1} tokens are needed."
            )
        images = full.img.long()
        ones = (
            images[..., None] == torch.arange(int(images.amax()) + 1, device=images.device)
        ).long()
        inside = ones.cumsum(1) - 1
        number = (inside * ones).sum(-1)
        return _State(
            layers=self.layers_of(prompt.anatomy),
            real=layout.real,
            img=torch.where(layout.visual, prompt.entered(images), -1),
            number=prompt.entered(number),
            counts=[[size for size in sizes if size] for sizes in ones.sum(1).tolist()],
        )

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Adds the rows up by key; changes nothing."""
        if self.queries == "generated":
            self._add_step(state, layer, a)
        elif a.shape[-1] == state.real.shape[1]:
            new = Columns.of(a, state.real.gather(1, rows))
            known = state.prompt.get(layer)
            state.prompt[layer] = new if known is None else known + new
            state.read[layer] = state.read.get(layer, 0) + a.shape[2]
        return None

    def _add_step(self, state: _State, layer: int, a: Float[Tensor, "B H R K"]) -> None:
        """Keeps the row of a token that was fed back."""
        keys, before = a.shape[-1], state.seen.get(layer)
        state.seen[layer] = keys
        steps = state.steps.setdefault(layer, [])
        if before is None or keys != before + 1:  # the prompt, or the text of another turn
            steps.clear()
            return
        steps.append(a[:, :, -1].clone())

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row, in plain JSON.

        Returns:
            Dictionaries with ``layers``, ``eps``, ``factor``, ``min_queries``, ``queries_from``,
            ``queries`` (their number T) and ``keys`` (positions of each image). If there was a
            query: ``rate`` (percent of layers and heads with ``alpha_k > eps``, k = 0 to 9);
            ``profile`` (per layer the share of heads whose first token is above eps), and
            ``first_above`` (the same for 0.1, 0.2 and 0.3, whatever eps is); per layer and head
            ``map`` (alpha of the first token), ``image_map`` (number of image sinks), and the part
            of all queries' attention that goes to sinks, ``first_mass``, ``text_mass``,
            ``image_mass`` (see :data:`REGIONS`); per layer and image ``sinks`` (pairs of a position
            of the image and the number of heads in which it is a sink); per image ``positions``,
            which are sinks in at least a quarter of all layers' heads.

        Raises:
            ValueError: If ``tokens`` are not one number per row.
            HiddenAttention: If the model's attention never showed its rows in some layer.
        """
        rows = state.real.shape[0]
        check_rows(tokens, rows)
        shown = state.seen if self.queries == "generated" else state.prompt
        check_shown(state.layers, shown)
        return [
            self._of_row(state, row, None if tokens is None else tokens[row]) for row in range(rows)
        ]

    def _of_row(self, state: _State, row: int, tokens: int | None) -> dict[str, Any]:
        """The record of one row, whose answer has so many tokens (None: all that ran)."""
        found = {layer: self._columns(state, layer, row, tokens) for layer in state.layers}
        first = found[state.layers[0]]
        record: dict[str, Any] = {
            "layers": list(state.layers),
            "eps": self.eps,
            "factor": self.factor,
            "min_queries": self.min_queries,
            "queries_from": self.queries,
            "queries": 0 if first is None else int(first.rows),
            "keys": state.counts[row],
        }
        measured = [columns for columns in found.values() if columns is not None]
        return record | (self._of_layers(state, row, measured) if measured else {})

    def _columns(self, state: _State, layer: int, row: int, tokens: int | None) -> Columns | None:
        """One layer's sums of one row over its real columns, fp64; None without a query."""
        real = state.real[row].cpu()
        if self.queries == "prompt":
            return _one(state.prompt[layer], row, real)
        kept = state.steps[layer]
        # What was generated last was never fed back.
        kept = kept if tokens is None else kept[: max(tokens - 1, 0)]
        if not kept:
            return None
        most = kept[-1].shape[-1]  # a key that was not there yet was not seen
        a = torch.stack([functional.pad(x[row], (0, most - x.shape[-1])) for x in kept], dim=1)
        columns = Columns.of(a[None].cpu().double(), torch.ones(1, len(kept), dtype=torch.bool))
        return _one(columns, 0, functional.pad(real, (0, most - len(real))))

    def _of_layers(self, state: _State, row: int, found: list[Columns]) -> dict[str, Any]:
        """What is said of one row's layers."""
        real = state.real[row].cpu()
        img, number = state.img[row].cpu()[real], state.number[row].cpu()[real]
        means = torch.cat([columns.means for columns in found])
        sinks = torch.cat(
            [
                sink_set(
                    columns.means,
                    columns.baseline[:, None],
                    columns.queries[:, None],
                    eps=self.eps,
                    factor=self.factor,
                    min_queries=self.min_queries,
                )
                for columns in found
            ]
        )
        first = torch.arange(len(img)) == 0
        regions = dict(zip(REGIONS, (first, (img < 0) & ~first, (img >= 0) & ~first), strict=True))
        taken = torch.cat([columns.shares for columns in found]) * sinks
        marks = (sinks & regions["image"]).sum(1)
        images = range(len(state.counts[row]))
        often = marks.sum(0) >= max(_OFTEN * sinks.shape[0] * sinks.shape[1], 1)
        above = means[..., 0] > self.eps
        return {
            "rate": short(sink_percent(means[..., :_RATED], self.eps).tolist()),
            "profile": short(above.double().mean(1).tolist()),
            "first_above": {
                str(level): short((means[..., 0] > level).double().mean(1).tolist())
                for level in _LEVELS
            },
            "map": short(means[..., 0].tolist()),
            "image_map": (sinks & regions["image"]).sum(-1).tolist(),
            **{
                f"{name}_mass": short(((taken * of).sum(-1)).tolist())
                for name, of in regions.items()
            },
            "sinks": [[_pairs(layer, img == i, number) for i in images] for layer in marks],
            "positions": [number[often & (img == i)].tolist() for i in images],
        }


def agreement(attention: Mapping[str, Any], states: Mapping[str, Any]) -> float | None:
    """The share of image sinks by attention that stand out in the hidden states as well.

    Args:
        attention: A record of :class:`AttentionSinks`.
        states: The record of :class:`mmlm.VisualSinks` of the same row.

    Returns:
        Every head's sinks count, over the layers that both measured; None if there are none.
    """
    by_state = dict(zip(states["layers"], states["sinks"], strict=True))
    both = total = 0
    for layer, images in zip(attention["layers"], attention.get("sinks", ()), strict=False):
        for image, pairs in enumerate(images if layer in by_state else ()):
            known = set(by_state[layer][image])
            total += sum(heads for _, heads in pairs)
            both += sum(heads for number, heads in pairs if number in known)
    return both / total if total else None


def _one(columns: Columns, row: int, real: Tensor) -> Columns:
    """The sums of one row over its own columns, on the CPU and in double precision."""
    own = slice(row, row + 1)

    def of(x: Tensor) -> Tensor:
        return x[own][..., real].cpu().double()

    return Columns(
        of(columns.sums), of(columns.queries), of(columns.even), columns.rows[own].cpu().double()
    )


def _pairs(heads: Tensor, inside: Tensor, number: Tensor) -> list[list[int]]:
    """Positions of one image that are sinks, and in how many heads."""
    found = inside & (heads > 0)
    return torch.stack([number[found], heads[found]], dim=-1).tolist()
