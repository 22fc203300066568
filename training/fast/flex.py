"""The packed rows' mask for FlexAttention, whose kernel leaves closed blocks out.

Its rule is tested to equal the dense mask. Training with it was never run: torch has no backward
pass of FlexAttention on a CPU.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from training.errors import FastPathRefused
from training.fast.pairs import NOTHING, PREFIX, PackedPairs

__all__ = ["block_mask", "rule"]


def rule(pairs: PackedPairs, window: int | None) -> Any:
    """The function ``(b, h, q, k) -> bool`` of one kind of layer; see :meth:`PackedPairs.seen`."""
    part, col = pairs.part, pairs.col

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        key = part[b, k]
        apart = (key != NOTHING) & ((key == PREFIX) | (key == part[b, q]))
        allowed = (q >= k) & apart
        if window is not None:
            allowed = allowed & (col[b, k] > col[b, q] - window)
        return allowed | (q == k)

    return seen


def block_mask(pairs: PackedPairs, window: int | None) -> Any:
    """The same as a ``BlockMask`` on the pairs' device.

    Raises:
        FastPathRefused: On a CPU, where FlexAttention cannot train.
    """
    from torch.nn.attention.flex_attention import create_block_mask

    rows, length = pairs.part.shape
    if pairs.part.device.type == "cpu":
        raise FastPathRefused(
            "shared_prefix: flex_attention has no backward pass on a CPU.",
            advice="Set sdpa: model.set_attn_implementation('sdpa').",
        )
    return create_block_mask(
        rule(pairs, window), rows, None, length, length, device=pairs.part.device
    )
