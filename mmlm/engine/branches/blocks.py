"""Tensors of several prompts in one batch, one block of rows below the other."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicLayer

__all__ = ["below", "is_plain", "left_padded", "stack", "take", "take_columns"]


def is_plain(cache: Any) -> bool:
    """Whether a cache keeps every column of every layer, so that rows can be laid below."""
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


def stack(cache: Any, others: list[Any], length: int) -> None:
    """Lays the rows of other caches below those of ``cache``, padded on the left to one length."""
    for i, layer in enumerate(cache.layers):
        parts = [layer, *(c.layers[i] for c in others)]
        layer.keys = left_padded([part.keys for part in parts], length, dim=-2)
        layer.values = left_padded([part.values for part in parts], length, dim=-2)


def left_padded(parts: list[Tensor], length: int, dim: int = -1) -> Tensor:
    """Rows of several tensors, each padded on the left of ``dim`` to one length."""
    after = (0, 0) * (-1 - dim)
    return torch.cat([functional.pad(x, (*after, length - x.shape[dim], 0)) for x in parts])


def below(positions: list[Tensor]) -> Tensor:
    """Position ids [B, L] or [axes, B, L] of several blocks of rows, one below the other."""
    axes = max((p.shape[0] for p in positions if p.ndim == 3), default=0)
    if axes:
        positions = [p if p.ndim == 3 else p.expand(axes, -1, -1) for p in positions]
    return torch.cat(positions, dim=-2)


def take(positions: Tensor, index: Tensor) -> Tensor:
    """Position ids [B, n] or [axes, B, n] of some columns [B, k] of each row."""
    if positions.ndim == 2:
        return positions.gather(1, index)
    return positions.gather(2, index.expand(positions.shape[0], -1, -1))


def take_columns(x: Tensor, index: Tensor) -> Tensor:
    """Keys or values [B, H, n, d] of some columns [B, k] of each row."""
    return x.gather(2, index[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3]))
