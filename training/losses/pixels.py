"""Other pictures in the place of a batch's own, whatever layout its processor uses.

Tiles [..., C, H, W] are pictures by themselves: a loss that crops or covers does so in every tile.
Packed patches of the Qwen kind are put together to the picture, changed, and packed again. Other
layouts, and videos, are refused by name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from mmlm.errors import UnsupportedModel

__all__ = ["change_pictures"]

Change = Callable[[Tensor], Tensor]
# Inputs that carry text; anything else beside `pixel_values` that holds pixels is unknown to us.
_TEXT = {
    "input_ids",
    "attention_mask",
    "completion_mask",
    "labels",
    "position_ids",
    "token_type_ids",
    "mm_token_type_ids",
}


def change_pictures(inputs: Mapping[str, Tensor], config: Any, change: Change) -> dict[str, Tensor]:
    """The same batch with changed pictures.

    Args:
        inputs: Of the model. Without a picture they come back as they are.
        config: The model's configuration.
        change: Turns one picture or tile [C, h, w] into another of the same shape; called in the
            order of the batch. What pads a tile or a batch at its right and lower edge stays
            outside and is left as it is, because some families tell padding by its zeros.

    Raises:
        UnsupportedModel: The pictures lie in a layout that is not known here.
    """
    pixels = inputs.get("pixel_values")
    if pixels is None:
        unknown = sorted(set(inputs) - _TEXT)
        if unknown:
            raise _unknown(config, ", ".join(unknown))
        return dict(inputs)
    if "pixel_values_videos" in inputs:
        raise _unknown(config, "pixel_values_videos")
    if pixels.ndim >= 4:
        changed = _tiles(pixels, change)
    elif pixels.ndim == 2 and "image_grid_thw" in inputs:
        changed = _patches(pixels, inputs["image_grid_thw"], config, change)
    else:
        raise _unknown(config, f"pixel_values of shape {list(pixels.shape)}")
    return {**inputs, "pixel_values": changed}


def _tiles(pixels: Tensor, change: Change) -> Tensor:
    """[..., C, H, W]."""
    changed = pixels.clone()
    for tile in changed.flatten(0, -4):
        drawn = tile.ne(0).any(0)  # [H, W]
        if not drawn.any():
            continue
        height, width = (int(drawn.any(axis).nonzero()[-1]) + 1 for axis in (1, 0))
        tile[:, :height, :width] = change(tile[:, :height, :width])
    return changed


def _patches(pixels: Tensor, grid: Tensor, config: Any, change: Change) -> Tensor:
    """[patches, C * frames * p * p], in blocks of m x m patches that the model merges to a token.

    A still picture stands in all frames of a patch; the change does too.
    """
    vision = config.vision_config
    try:
        m, frames, p = vision.spatial_merge_size, vision.temporal_patch_size, vision.patch_size
    except AttributeError as error:
        raise _unknown(config, f"packed patches and no {error.name} in its configuration") from None
    changed = []
    for patches, (t, h, w) in zip(pixels.split(grid.prod(-1).tolist()), grid.tolist(), strict=True):
        blocks = patches.view(t, h // m, w // m, m, m, -1, frames, p, p)
        # To [t, C, frames, rows, block row, pixel row, columns, block column, pixel column].
        pictures = blocks.permute(0, 5, 6, 1, 3, 7, 2, 4, 8).reshape(t, -1, frames, h * p, w * p)
        new = torch.stack([change(one[:, 0]) for one in pictures])[:, :, None]
        new = new.expand(-1, -1, frames, -1, -1).unflatten(3, (h // m, m, p))
        new = new.unflatten(6, (w // m, m, p)).permute(0, 3, 6, 4, 7, 1, 2, 5, 8)
        changed.append(new.reshape(patches.shape))
    return torch.cat(changed)


def _unknown(config: Any, what: str) -> UnsupportedModel:
    kind = getattr(config, "model_type", type(config).__name__)
    return UnsupportedModel(
        f"The pictures of {kind} cannot be changed: {what}. Known are pixel_values "
        "[..., C, H, W], and packed patches with image_grid_thw.",
        advice="Use losses that leave the pictures alone: Anchor, RLHFV, AuxiliarySFT.",
    )
