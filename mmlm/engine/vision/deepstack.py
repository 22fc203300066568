"""Image features that are added to the outputs of the first decoder layers (Qwen3-VL)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["stacked", "unstacked"]


def stacked(deep: list[Tensor]) -> dict[str, Any]:
    """The decoder's arguments for what is added to its first layers' outputs, [B, n, D] each."""
    everywhere = deep[0].new_ones(deep[0].shape[:2], dtype=torch.bool)
    return {
        "visual_pos_masks": everywhere,
        "deepstack_visual_embeds": [level.flatten(0, 1) for level in deep],
    }


def unstacked(kwargs: dict[str, Any], like: Tensor) -> list[Tensor]:
    """The same from the decoder's arguments: dense, zero outside the images; empty without any."""
    deep, where = kwargs.get("deepstack_visual_embeds"), kwargs.get("visual_pos_masks")
    if not deep or where is None:
        return []
    zero = torch.zeros_like(like)
    return [zero.masked_scatter(where[..., None], level.to(like.dtype)) for level in deep]
