"""Scores of patches from one row of a tower's attention, shared by the methods that drop patches.

The row is the class token's, or where a tower has none that of the mean query (flowcut's rule for
such towers). Everything is fp32 and O(P) per tile.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.engine.vision.patch_look import PatchLook

__all__ = ["attention_row", "entropy", "magnitude", "similarity_row", "top", "unit_sums"]


def attention_row(look: PatchLook) -> Float[Tensor, "T P"]:
    """Mean over heads of the row's attention to patches; the class token's column is left out."""
    return look.scores.softmax(-1).mean(1)[:, look.first :]


def similarity_row(look: PatchLook) -> Float[Tensor, "T P"]:
    """Mean over heads of ``softmax(v_class . v_j)``, unscaled; without the class token's column."""
    v = look.values
    s = torch.einsum("thd,thsd->ths", v[:, :, 0], v)
    return s.masked_fill(~look.seen[:, None], -torch.inf).softmax(-1).mean(1)[:, look.first :]


def magnitude(look: PatchLook) -> Float[Tensor, "T P"]:
    """L1 norm of each patch's value, heads averaged first."""
    return look.values[:, :, look.first :].mean(1).abs().sum(-1)


def entropy(p: Float[Tensor, "T P"], floor: float = 0.0) -> Float[Tensor, " T"]:
    """Entropy of each row in nats; 0 log 0 = 0.

    Args:
        p: Rows of probabilities.
        floor: Added inside of the logarithm (the authors' 1e-7 on towers without class token).
    """
    return -torch.special.xlogy(p, p + floor).sum(-1)


def unit_sums(
    values: Float[Tensor, "T P"], units: Int[Tensor, "T P"], count: int
) -> Float[Tensor, "T U"]:
    """Sums over the patches of each unit; columns of unit -1 count nowhere."""
    sums = values.new_zeros(values.shape[0], count + 1)
    place = torch.where(units < 0, count, units)
    return sums.scatter_add(1, place, values.masked_fill(units < 0, 0))[:, :count]


def top(scores: Float[Tensor, "T P"], counts: Int[Tensor, " T"]) -> Bool[Tensor, "T P"]:
    """Where the ``counts`` largest scores of each row stand; of equal ones the first."""
    order = scores.argsort(dim=1, descending=True, stable=True)
    rank = torch.empty_like(order)
    columns = torch.arange(scores.shape[1], device=scores.device).expand_as(order)
    rank.scatter_(1, order, columns)
    return rank < counts[:, None]
