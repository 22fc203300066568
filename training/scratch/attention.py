"""Attention for short rows on a CPU: plain matrix products in the row's own precision.

torch's fused CPU kernel is written for long sequences; at 100 to 250 positions and heads of 32 its
backward pass takes 2.6 times as long as three batched matrix products in bfloat16 (measured: 54
against 20 ms a layer, batch 24, 2 cores), and it cannot leave out the blocks that the mask closes.
Importing this module registers both functions; `set_attn_implementation` chooses them by name, and
nothing of this reaches a saved checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

__all__ = ["DENSE", "PACKED", "dense", "packed"]

DENSE = "mmlm_dense"
PACKED = "mmlm_packed"


def dense(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Every position attends to every position: a vision tower.

    Args:
        module: the attention module, unused.
        query: [B, H, L, d], key and value likewise.
        key: see query.
        value: see query.
        attention_mask: must be absent.
        scaling: factor on the scores.
        kwargs: whatever else the library passes, unused.

    Raises:
        ValueError: a mask is given.
    """
    if attention_mask is not None:
        raise ValueError(f"{DENSE} attends everywhere and takes no mask: use sdpa instead")
    return _attend(query * scaling, key, value, None).transpose(1, 2), None


def packed(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float,
    segments: Sequence[int],
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Texts behind a shared prefix: only the blocks that `block_mask` leaves open are computed.

    Args:
        module: the attention module, unused.
        query: [B, H, L, d], key and value likewise, as many heads each.
        key: see query.
        value: see query.
        attention_mask: `training.scratch.packing.block_mask(segments)`.
        scaling: factor on the scores.
        segments: lengths of the prefix and of each text, L in all.
        kwargs: whatever else the library passes, unused.
    """
    sizes = list(segments)
    prefix = sizes[0]
    queries = (query * scaling).split(sizes, 2)
    keys, values = key.split(sizes, 2), value.split(sizes, 2)
    out = [_attend(queries[0], keys[0], values[0], attention_mask[..., :prefix, :prefix])]
    start = prefix
    for q, k, v in zip(queries[1:], keys[1:], values[1:], strict=True):
        end = start + q.shape[2]
        own = attention_mask[..., start:end, start:end]
        k, v = torch.cat([keys[0], k], 2), torch.cat([values[0], v], 2)
        out.append(_attend(q, k, v, own))
        start = end
    return torch.cat([o.transpose(1, 2) for o in out], 1), None


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Tensor:
    """Softmax attention; the mask, if any, applies to the last columns, in place."""
    scores = query @ key.transpose(-1, -2)  # [B, H, R, K]
    if mask is not None:
        scores[..., scores.shape[-1] - mask.shape[-1] :] += mask
    return scores.softmax(-1) @ value


for _name, _function in ((DENSE, dense), (PACKED, packed)):
    AttentionInterface.register(_name, _function)
    # Without a mask function of the same name the library builds no mask at all. Masks that come
    # in ready-made, as here, pass through it unchanged.
    AttentionMaskInterface.register(_name, sdpa_mask)
