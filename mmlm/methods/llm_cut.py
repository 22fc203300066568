"""FlowCut's second stage: visual positions scored by the last prompt row of one decoder layer."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.methods.patch_scores import top

__all__ = ["keep_visual", "visual_scores"]


def visual_scores(
    s: Float[Tensor, "B H K"], values: Float[Tensor, "B H K d"], visual: Bool[Tensor, "B K"]
) -> Float[Tensor, "B K"]:
    """``(a / sum a + e / sum e) M`` of visual positions, -inf elsewhere.

    Args:
        s: Scaled scores of the last row with all positions.
        values: Values of all positions, one set per query head.
        visual: Visual positions; a row may have none.
    """
    v = values.float()
    likeness = torch.einsum("bhd,bhkd->bhk", v[:, :, -1], v) * v.shape[-1] ** -0.5

    def row(x: Tensor) -> Tensor:
        hidden = ~visual[:, None]
        # Rows without a picture are all hidden; what they get is masked below.
        p = x.float().masked_fill(hidden, torch.finfo(torch.float32).min).softmax(-1)
        p = p.masked_fill(hidden, 0).mean(1)
        return p / p.sum(-1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)

    scores = (row(s) + row(likeness)) * v.mean(1).abs().sum(-1)
    return scores.masked_fill(~visual, -torch.inf)


def keep_visual(
    scores: Float[Tensor, "B K"],
    visual: Bool[Tensor, "B K"],
    standing: Int[Tensor, "B n"],
    target: int,
) -> tuple[Int[Tensor, "B n"], Bool[Tensor, "B K"]]:
    """Columns that go on: the ``target`` best visual positions of each row and all others.

    Args:
        scores: Of visual positions, -inf elsewhere.
        visual: Visual positions.
        standing: Positions of the columns that are there, -1 for none.
        target: Visual positions that go on; rows with no more keep all.

    Returns:
        Columns, -1 for none, and the visual positions that stay.
    """
    place, there = standing.clamp(min=0), standing >= 0
    own = scores.gather(1, place).masked_fill(~there, -torch.inf)
    seen = visual.gather(1, place) & there
    best = top(own, torch.full((len(own),), target, device=own.device)) & seen
    keep = best | (there & ~seen)
    columns = torch.arange(keep.shape[1], device=keep.device)
    # What stands nowhere is marked in a spare column, which is cut off again.
    width = visual.shape[1]
    marks = torch.zeros(len(visual), width + 1, dtype=torch.bool, device=visual.device)
    marks = marks.scatter(1, torch.where(there, standing, width), best)
    return torch.where(keep, columns, -1), marks[:, :width]
