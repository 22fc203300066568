"""Where a model looks while it writes: attention on every image position, token by token.

Attention over the image is what most papers on object hallucination argue with, e.g. "See What You
Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321 (2025). The map itself
is no method of theirs: nothing is taken from a paper or from code but the definition of attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlm.engine.method import Paper, Prompt, Rows
from mmlm.probes.layer_probe import LayerProbe, check_rows, check_shown, short

__all__ = ["AttentionMap"]


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        layers: Those that are measured.
        img: int64 [B, N]; image of each position that was given, -1 outside.
        at: int64 [B, n]; the given position of each column of the prompt, -1 where it is none of
            an image.
        marks: fp32 [B, n, I]; which column belongs to which image: 1 or 0.
        seen: Positions so far, by layer.
        shares: Per layer fp32 [B, I] for every token: attention of the row that produced it.
        sums: fp32 [B, n] for every token; the same per column, summed over the layers.
        rows: Per layer what ``sums`` adds up, if it is wanted.
    """

    layers: tuple[int, ...]
    img: Tensor
    at: Tensor
    marks: Tensor
    seen: dict[int, int] = field(default_factory=dict)
    shares: dict[int, list[Tensor]] = field(default_factory=dict)
    sums: list[Tensor] = field(default_factory=list)
    rows: dict[int, list[Tensor]] = field(default_factory=dict)

    def forget(self, layer: int) -> None:
        """Drops what a layer saw of an earlier answer; layers come in order."""
        self.shares.pop(layer, None)
        self.rows.pop(layer, None)
        if layer == self.layers[0]:
            self.sums.clear()


@dataclass(frozen=True, kw_only=True)
class AttentionMap(LayerProbe):
    """Measures how much attention each new token pays to every position of every image.

    Idea:
        A word that names what is there was as a rule written with attention on it; one that was
        invented was not. A map per word lets a person see which.
    Paper:
        "See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        arXiv 2503.03321, ICLR 2025, for what such a map can and cannot tell.
    Equations:
        ``m_t(k) = mean over layers and heads of A(q_t, k)`` at image positions k, with q_t the row
        that *produced* token t: the prompt's last one for the first token, then the row of the
        token before.
    Acts at:
        ``weights`` (looks, behind the edits of all other methods) of the last row of each pass, in
        the chosen layers.
    Cost:
        No extra forward. Per token and layer one row of attention weights is computed again.
        Memory: one number per token and position of the prompt; with ``by_layer`` for each layer.
    Parameters:
        layers: Decoder layers, each >= 0. None: all.
        by_layer: Whether the record holds a map for every layer too, and not only their mean.
    Shapes:
        B rows, H query heads, R query rows, K keys, N given positions, n of them in the decoder.
    State:
        Per prompt: which position belongs to which image, and the rows.
    Limits:
        Beam search is refused. Frames of images are text; row ends belong to their image. What a
        method left out of the prompt has attention 0; where features are pooled, the attention on
        a cell stands at its centre. With several answers on one kept cache the last is measured.

    Raises:
        ValueError: for layers that the model does not have.

    Example:
        with AttentionMap()(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title="See What You Are Told: Visual Attention Sink in Large Multimodal Models",
        arxiv="2503.03321",
        year=2025,
        venue="ICLR 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})
    measures: ClassVar[str] = "attention_map"

    by_layer: bool = False

    def __post_init__(self) -> None:
        self._check_choice("by_layer", (True, False))
        super().__post_init__()

    @property
    def rows(self) -> Rows:
        """The last row of each pass."""
        return "last"

    def begin(self, prompt: Prompt) -> _State:
        """Notes which position belongs to which image, also of those that do not enter."""
        full, entered = prompt.full_layout, prompt.layout.visual
        number = torch.arange(full.length, device=full.seg.device).expand(full.rows, -1)
        at = torch.where(entered, prompt.entered(number.contiguous()), -1)
        own = torch.where(entered, full.img.long().gather(1, at.clamp(min=0)), -1)
        images = torch.arange(int(full.img.amax()) + 1, device=own.device)
        marks = (own[..., None] == images).float()
        return _State(self.layers_of(prompt.anatomy), full.img.long(), at, marks)

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Adds the row up, by image and over the layers; changes nothing."""
        keys, before = a.shape[-1], state.seen.get(layer)
        state.seen[layer] = keys
        if before is not None and keys != before + 1:  # a new turn: its answer begins
            state.forget(layer)
        row = a[:, :, -1, : state.at.shape[1]].mean(1)
        shares = state.shares.setdefault(layer, [])
        if len(shares) == len(state.sums):
            state.sums.append(row.clone() if self.by_layer else row)
        else:
            state.sums[len(shares)] += row
        shares.append(torch.bmm(row[:, None], state.marks)[:, 0])
        if self.by_layer:
            state.rows.setdefault(layer, []).append(row)
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row, in plain JSON.

        Returns:
            Dictionaries with ``layers``; ``keys`` (positions of each image); ``shares`` (per layer,
            per token, per image the attention on it, in [0, 1]); ``maps`` (per token, per image the
            attention on each of its positions, mean over the layers, in the order of the
            sequence); with ``by_layer`` also ``layer_maps`` (per layer what ``maps`` is).

        Raises:
            ValueError: If ``tokens`` are not one number per row.
            HiddenAttention: If the model's attention never showed its rows in some layer.
        """
        n_rows = state.img.shape[0]
        check_rows(tokens, n_rows)
        counts = (state.img.amax(-1) + 1).tolist()
        if any(counts):
            check_shown(state.layers, state.shares)
        ran = len(state.sums)
        lengths = [ran] * n_rows if tokens is None else [min(n, ran) for n in tokens]
        return [self._of_row(state, row, images, lengths[row]) for row, images in enumerate(counts)]

    def _of_row(self, state: _State, row: int, images: int, n: int) -> dict[str, Any]:
        """The record of one row, from what was kept of its first ``n`` tokens."""
        img = state.img[row].cpu()
        where = [(img == image).nonzero()[:, 0] for image in range(images)]
        record: dict[str, Any] = {
            "layers": list(state.layers),
            "keys": [len(positions) for positions in where],
        }
        shares = [_stacked(state.shares.get(layer, [])[:n], row, images) for layer in state.layers]
        record["shares"] = [short(layer[:, :images].tolist()) for layer in shares]
        spread = partial(_spread, at=state.at[row].cpu(), length=len(img))
        kept = _stacked(state.sums[:n], row, state.at.shape[1]) / len(state.layers)
        record["maps"] = _split(spread(kept), where)
        if self.by_layer:
            rows = [_stacked(state.rows[layer][:n], row, 0) for layer in state.layers]
            record["layer_maps"] = [_split(spread(layer), where) for layer in rows]
        return record


def _stacked(steps: list[Tensor], row: int, width: int) -> Float[Tensor, "n width"]:
    """One row of what was kept of each token, in double precision."""
    if not steps:
        return torch.zeros(0, width, dtype=torch.float64)
    return torch.stack([step[row, ...] for step in steps]).cpu().double()


def _spread(kept: Float[Tensor, "n c"], at: Int[Tensor, " c"], length: int) -> Tensor:
    """What was kept, at all positions that were given [n, length]; 0 where nothing was."""
    full = kept.new_zeros(len(kept), length)
    full[:, at[at >= 0]] = kept[:, at >= 0]
    return full


def _split(rows: Float[Tensor, "n N"], where: list[Tensor]) -> list[list[list[float]]]:
    """Rows as lists: per token, per image, per position."""
    parts = [short(rows[:, positions].tolist()) for positions in where]
    return [[part[token] for part in parts] for token in range(len(rows))]
