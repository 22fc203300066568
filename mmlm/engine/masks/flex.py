"""Masks of blocks for flex kernels: the library's own rule, and what methods open beside it.

The library builds such a mask from a function of indices and compiles the building. That function
is asked for here (an "implementation" whose mask is the function itself), so that documents,
windows and padding stay the library's, and a mask is built once.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, create_block_mask
from transformers import AttentionMaskInterface
from transformers.masking_utils import (
    add_offsets_to_mask_function,
    and_masks,
    padding_mask_function,
    prepare_padding_mask,
)

__all__ = ["BlockRule", "asking", "block_mask"]

_NAME = "mmlm_block_rule"
_Where: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class BlockRule:
    """What a mask of blocks would be built from.

    Attributes:
        function: ``(b, h, q, k) -> bool`` on indices of the pass's queries and keys.
        shape: Rows, queries and keys.
        device: Where the mask belongs.
    """

    function: Callable[..., Tensor]
    shape: tuple[int, int, int]
    device: torch.device


def asking(config: Any) -> Any:
    """A configuration under which the library's mask builders return a :class:`BlockRule`."""
    AttentionMaskInterface.register(_NAME, _rule)
    twin = copy.copy(config)
    twin._attn_implementation_internal = _NAME
    return twin


def _rule(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    *,
    mask_function: Callable[..., Tensor],
    attention_mask: Tensor | None = None,
    device: torch.device,
    **_: Any,
) -> BlockRule:
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        mask_function = and_masks(mask_function, padding_mask_function(padding))
    function = add_offsets_to_mask_function(mask_function, q_offset, kv_offset)
    return BlockRule(function, (batch_size, q_length, kv_length), torch.device(device))


def block_mask(base: BlockRule | BlockMask, more: _Where) -> BlockMask:
    """A mask of blocks with more columns open.

    Args:
        base: What is seen anyway.
        more: ``(b, q, k) -> bool`` on indices of the pass's queries and keys: what is opened.
    """
    if isinstance(base, BlockMask):
        function, device = base.mask_mod, base.kv_num_blocks.device
        rows, (queries, keys) = base.shape[0], base.shape[-2:]
    else:
        function, device, (rows, queries, keys) = base.function, base.device, base.shape

    def seen(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return function(b, h, q, k) | more(b, q, k)

    # Uncompiled, the whole matrix of indices would be made on the way.
    compiled = device.type == "cuda"
    return create_block_mask(seen, rows, None, queries, keys, device=device, _compile=compiled)
