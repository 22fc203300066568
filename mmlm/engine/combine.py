"""The law by which the edits of several methods at one site are combined. Pure functions.

Gains multiply and deltas add, so their order does not matter. Replacements (``layer_in``,
``layer_out``, ``mlp``, ``weights``) run in the user's order, each on the result of the one before.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["chain", "edit_logits", "product", "total"]


def product(gains: Iterable[Tensor | None]) -> Tensor | None:
    """The product of all gains that are not None; None if there is none."""
    result: Tensor | None = None
    for gain in gains:
        if gain is not None:
            result = gain if result is None else result * gain
    return result


def total(deltas: Iterable[Tensor | None]) -> Tensor | None:
    """The sum of all deltas that are not None; None if there is none."""
    result: Tensor | None = None
    for delta in deltas:
        if delta is not None:
            result = delta if result is None else result + delta
    return result


def chain(edits: Iterable[Callable[[Tensor], Tensor | None]], x: Tensor) -> Tensor:
    """Applies replacements in order; an edit that returns None only looked."""
    for edit in edits:
        new = edit(x)
        x = x if new is None else new
    return x


def edit_logits(
    z: Float[Tensor, "B V"],
    delta: Float[Tensor, "B V"] | None,
    beta: float,
    active: Bool[Tensor, "B"],
) -> Float[Tensor, "B V"]:
    """Adds the summed delta and cuts implausible tokens once.

    The cut is the adaptive plausibility constraint of contrastive decoding (Li et al., ACL 2023,
    Eq. 3): tokens with ``p < beta * max p`` under the *main* branch get -inf. It is computed on
    ``z`` before the delta, with the largest ``beta`` of all methods.

    Args:
        z: Raw logits of the main branch, fp32.
        delta: Sum of the methods' deltas, or None.
        beta: Cut-off fraction in [0, 1]; 0 cuts nothing.
        active: Rows that are edited; the others are returned as they are.
    """
    edited = z if delta is None else z + delta
    if beta > 0:
        floor = z.amax(-1, keepdim=True) + math.log(beta)
        edited = edited.masked_fill(z < floor, -math.inf)
    return torch.where(active[:, None], edited, z)
