"""How much attention generated tokens pay to each image of a prompt.

Paper: "MIA-DPO: Multi-Image Augmented Direct Preference Optimization For Large Vision-Language
Models", arXiv 2410.17637 (2024), which selects training pairs by it. Authors' code:
Liuziyu77/MIA-DPO, commit a85c51a, ``gen_data/gen_chosen_rejected``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.layout import ANSWER, TokenLayout
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import check_layers
from mmlm.probes.layer_probe import check_rows, check_shown, short

__all__ = ["ImageAttention", "central_layer", "image_marks", "key_sums"]


def central_layer(n_layers: int) -> int:
    """The layer that is measured by default: 16 of 32 (authors), else round(L / 2) (ours).

    Args:
        n_layers: Decoder layers L, >= 1.
    """
    return round(n_layers / 2)


def image_marks(layout: TokenLayout) -> Float[Tensor, "B N I"]:
    """Which position belongs to which image of its row: 1 or 0; I is the most images of a row."""
    count = int(layout.img.amax()) + 1
    index = torch.arange(count, device=layout.img.device)
    return (layout.img[..., None] == index).float()


def key_sums(
    a: Float[Tensor, "B H R K"], counted: Bool[Tensor, "B R"] | None, n: int
) -> Float[Tensor, "B n"]:
    """Attention on the first n keys: mean over heads, summed over the counted rows (None: all)."""
    seen = a[..., :n].mean(1)
    if counted is not None:
        seen = seen * counted[..., None]
    return seen.sum(1)


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        layer: The layer that is measured.
        marks: fp32 [B, N, I]; see :func:`image_marks`.
        counts: Images of each row.
        answer: Bool [B, N]; positions of a given answer.
        positions: Of each row's images in the sequence, if maps are wanted.
        seen: Positions so far.
        given: fp32 [B, N]; attention of a given answer on every key.
        steps: For every generated token that was fed back fp32 [B, I], or [B, N] for maps.
    """

    layer: int
    marks: Tensor
    counts: list[int]
    answer: Tensor
    seen: int = 0
    given: Tensor | None = None
    steps: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class ImageAttention(Method):
    """Measures how much attention new tokens pay to each image of their prompt, in one layer.

    Idea:
        An answer about the wrong one of several images was written with attention elsewhere.
    Paper:
        "MIA-DPO: Multi-Image Augmented Direct Preference Optimization For Large Vision-Language
        Models", arXiv 2410.17637, 2024.
    Equations:
        ``a_i = sum over keys of image i of A(q, k)``, A the mean over heads of the softmaxed
        weights, summed over queries q; the ratio of image i is ``a_i / sum_j a_j``.
    Acts at:
        ``weights`` (looks, behind the edits of all other methods) of every token that was
        generated and fed back, in one layer.
    Cost:
        No extra forward. Per token one row of attention weights of one layer is computed again;
        for a given answer its rows, in chunks, summed as they come.
    Parameters:
        layer: Decoder layer, >= 0. None: 16 of 32 (authors), else round(L / 2):
            :func:`central_layer`.
        queries: "generated": tokens that the model itself wrote (default). "answer": positions
            that a given layout marks as answer (teacher forcing). The last token of an answer is
            no query: nothing is fed back behind it.
        maps: Whether the record holds the attention on every position of an image, for regions
            within a picture, and not only its sum.
    Shapes:
        B rows, H query heads, R query rows, K keys, N prompt positions, I images of a row.
    State:
        Per prompt: which position belongs to which image, and the sums.
    Limits:
        Beam search is refused. Of an image its own features count, row ends among them; frames
        are text. Text of a second turn on a kept cache is no query.

    Raises:
        ValueError: for a layer that the model does not have, or an unknown kind of queries.

    Example:
        with ImageAttention()(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title=(
            "MIA-DPO: Multi-Image Augmented Direct Preference Optimization For Large "
            "Vision-Language Models"
        ),
        arxiv="2410.17637",
        year=2024,
        venue="ICLR 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})
    needs_all_visual: ClassVar[bool] = True
    measures: ClassVar[str] = "image_attention"

    layer: int | None = None
    queries: Literal["generated", "answer"] = "generated"
    maps: bool = False

    def __post_init__(self) -> None:
        self._check_choice("queries", ("generated", "answer"))
        self._check_choice("maps", (True, False))
        if self.layer is not None:
            self._check_integer("layer", at_least=0)

    def neutral(self) -> ImageAttention:
        """Itself: the model is unchanged under every setting."""
        return self

    @property
    def rows(self) -> Rows:
        """The last row of each pass; for a given answer the text behind the last image."""
        return "last" if self.queries == "generated" else "tail"

    def layer_of(self, anatomy: Anatomy) -> int:
        """The layer that is measured on a model."""
        return central_layer(anatomy.n_layers) if self.layer is None else self.layer

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The one layer."""
        return layer == self.layer_of(anatomy)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Runs wherever attention rows can be seen."""
        check_layers("ImageAttention", (self.layer_of(anatomy),), anatomy.n_layers)
        return []

    def begin(self, prompt: Prompt) -> _State:
        """Notes which position belongs to which image."""
        layout = prompt.layout
        return _State(
            layer=self.layer_of(prompt.anatomy),
            marks=image_marks(layout),
            counts=(layout.img.amax(-1) + 1).tolist(),
            answer=layout.seg == ANSWER,
        )

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Adds a row up, or those of a given answer; changes nothing."""
        keys, before, n = a.shape[-1], state.seen, state.marks.shape[1]
        state.seen = keys
        if self.queries == "answer":
            if keys == n:
                new = key_sums(a, state.answer.gather(1, rows), n)
                state.given = new if state.given is None else state.given + new
        elif before and keys == before + 1:  # several new positions are another turn's text
            seen = key_sums(a, None, n)
            state.steps.append(seen if self.maps else _by_image(seen, state.marks))
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row, in plain JSON.

        Returns:
            Dictionaries with ``layer``, ``queries`` (number of rows in the sums; 0 for an answer
            of one token), ``images`` (per image the attention on it, mean over heads, summed over
            queries), ``keys`` (positions of each image), and with ``maps`` the same per position
            of each image.

        Raises:
            ValueError: If ``tokens`` are not one number per row.
            HiddenAttention: If the model's attention never showed its rows in that layer.
        """
        n_rows = state.marks.shape[0]
        check_rows(tokens, n_rows)
        if any(state.counts):
            check_shown((state.layer,), (state.layer,) if state.seen else ())
        sums, queries = self._sums(state, tokens)
        marks = state.marks.cpu()
        sizes = marks.sum(1).long().tolist()
        return [
            {"layer": state.layer, "queries": queries[row], "keys": sizes[row][:count]}
            | self._of_images(sums[row], marks[row, :, :count])
            for row, count in enumerate(state.counts)
        ]

    def _of_images(self, sums: Tensor, marks: Tensor) -> dict[str, Any]:
        """Sums of one row by image; fp64 [N] or [I], marks [N, images]."""
        if not (self.maps or self.queries == "answer"):  # added up by image already
            return {"images": [short(x) for x in sums[: marks.shape[1]].tolist()]}
        parts = [sums[mark > 0] for mark in marks.T]
        record: dict[str, Any] = {"images": [short(float(part.sum())) for part in parts]}
        if self.maps:
            record["maps"] = [[short(x) for x in part.tolist()] for part in parts]
        return record

    def _sums(self, state: _State, tokens: Sequence[int] | None) -> tuple[Tensor, list[int]]:
        """Sums of every row, fp64 [B, N] or [B, I], and the number of queries behind them."""
        rows, n, images = state.marks.shape
        if self.queries == "answer":
            given = state.marks.new_zeros(rows, n) if state.given is None else state.given
            return given.cpu().double(), state.answer.sum(-1).tolist()
        ran = len(state.steps)
        # What was generated last was never fed back.
        queries = [ran] * rows if tokens is None else [max(min(t - 1, ran), 0) for t in tokens]
        if not ran:
            return torch.zeros(rows, n if self.maps else images, dtype=torch.float64), queries
        used = torch.tensor(queries) > torch.arange(ran)[:, None]
        steps = torch.stack(state.steps).cpu().double()
        return (steps * used[..., None]).sum(0), queries


def _by_image(sums: Float[Tensor, "B N"], marks: Float[Tensor, "B N I"]) -> Tensor:
    return torch.bmm(sums[:, None], marks)[:, 0]
