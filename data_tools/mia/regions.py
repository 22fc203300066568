"""Which tokens of a composed picture show which of its tiles.

Processors resize, pad, crop and cut pictures in ways of their own. None of this is worked out again
here: a mask of each tile, white on black, is sent through the very processor that prepares the
composed picture, and what arrives at a patch is the part of it that shows the tile. From patches to
tokens it goes through the model's own packing. A family whose way from patches to tokens is not
known is refused.

For parity there is the authors' split of the token grid into equal blocks (Liuziyu77/MIA-DPO,
commit a85c51a), which knows neither labels nor padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmlm.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

    from mmlm.engine.anatomy import Anatomy

__all__ = ["KNOWN", "Tile", "central_square", "equal_blocks", "region_sums", "tile_shares"]

Tile = Sequence[int]
"""``[x0, y0, x1, y1]`` in pixels, the right and lower border excluded."""
KNOWN = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "paligemma",
        "qwen2_5_vl",
        "qwen3_vl",
        "smolvlm",
    }
)
"""Model types whose way from patches to tokens is checked by a test."""
_CENTRE = 16
"""Side of the authors' centre, of 24."""


def equal_blocks(grid: Tensor, rows: int, columns: int) -> list[float]:
    """Sums of the blocks of an equal split; the first blocks get what is left over (authors).

    Args:
        grid: [h, w], attention on the tokens of one picture.
        rows: Rows of blocks.
        columns: Columns of blocks.

    Returns:
        Row by row, the block of the first picture first.

    Raises:
        ValueError: If there are more blocks than tokens in a direction.
    """
    height, width = grid.shape
    if rows > height or columns > width:
        raise ValueError(f"{rows} x {columns} blocks do not fit a grid of {height} x {width}")
    return [
        float(block.double().sum())
        for band in grid.tensor_split(rows, dim=0)
        for block in band.tensor_split(columns, dim=1)
    ]


def central_square(grid: Tensor, side: int = _CENTRE) -> float:
    """Sum of the central square of a token grid, the authors' stand-in for an inner picture.

    Args:
        grid: [h, w].
        side: Tokens; the authors' 16 of 24.

    Raises:
        ValueError: If the grid is smaller.
    """
    height, width = grid.shape
    if side > min(height, width):
        raise ValueError(f"a centre of {side} x {side} does not fit a grid of {height} x {width}")
    top, left = (height - side) // 2, (width - side) // 2
    return float(grid[top : top + side, left : left + side].double().sum())


def region_sums(attention: Tensor, parts: Tensor) -> list[float]:
    """Attention on every region: each token counts by the part of it that shows the region.

    Args:
        attention: [tokens] of one picture, in the order of the sequence.
        parts: [regions, tokens] in [0, 1], see `tile_shares`.
    """
    sums: list[float] = (parts.double() @ attention.double()).tolist()
    return sums


def tile_shares(model: Any, processor: Any, size: tuple[int, int], tiles: Sequence[Tile]) -> Tensor:
    """Which part of every token shows which tile of a picture.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor.
        size: Width and height of the picture, in pixels.
        tiles: Rectangles in it.

    Returns:
        fp32 [1 + tiles, tokens] in [0, 1]: first the picture as a whole (less than 1 where a
        token shows padding), then its tiles. Tokens that show nothing (row ends) have 0. Tiles
        that the processor crops away have 0 everywhere.

    Raises:
        UnsupportedModel: For a family whose way from patches to tokens is not known.
    """
    import torch

    from mmlm.engine.anatomy import Anatomy

    anatomy = Anatomy(model)
    if anatomy.family_name not in KNOWN:
        raise _unknown(anatomy, "its way from patches to tokens is not known")
    whole = (0, 0, *size)
    black, *masks = [_pixels(model, processor, size, tile) for tile in (None, whole, *tiles)]
    reach = masks[0]["pixel_values"] - black["pixel_values"]
    # Padding is the same in all of them, and so becomes 0.
    reach = reach.where(reach != 0, torch.ones(()))
    parts = torch.stack([(x["pixel_values"] - black["pixel_values"]) / reach for x in masks])
    tokens = int((torch.isin(black["input_ids"], torch.tensor(anatomy.image_ids))).sum())
    found = _to_tokens(anatomy, _to_patches(anatomy, parts), black, tokens)
    return found.clamp(0, 1)  # sharp resampling overshoots at borders


def _pixels(
    model: Any, processor: Any, size: tuple[int, int], tile: Tile | None
) -> dict[str, Tensor]:
    """What the processor makes of a black picture with a white rectangle in it."""
    from PIL import Image

    from mmlm.inputs import message, prepare

    picture = Image.new("RGB", size)
    if tile is not None:
        x0, y0, x1, y1 = tile
        picture.paste((255, 255, 255), (x0, y0, x1, y1))
    return prepare(processor, [[message("user", "", 1)]], [[picture]])


def _to_patches(anatomy: Anatomy, parts: Tensor) -> Tensor:
    """Means over the pixels of each patch: [regions, patches] or [regions, tiles, h, w]."""
    from torch.nn import functional

    if parts.ndim == 3:  # flattened patches
        return parts.mean(-1)
    regions, patch = len(parts), anatomy.config.vision_config.patch_size
    grey = parts.flatten(1, -4).mean(-3)  # [regions, tiles, H, W]
    side = patch if isinstance(patch, int) else patch[0]
    return functional.avg_pool2d(grey, side).view(regions, grey.shape[1], -1)


def _to_tokens(anatomy: Anatomy, parts: Tensor, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """Parts of patches as parts of tokens, in the order of the sequence."""
    if parts.ndim == 2:  # patches that become one token stand side by side
        merge = anatomy.config.vision_config.spatial_merge_size
        found = parts.view(len(parts), -1, merge * merge).mean(-1)
    elif anatomy.family.sizes == "packed":
        found = _packed(anatomy, parts, inputs)
    else:
        found = _merged(anatomy, parts, tokens)
    if found.shape[1] != tokens:
        raise _unknown(anatomy, f"{found.shape[1]} cells are expected for {tokens} image tokens")
    return found


def _packed(anatomy: Anatomy, parts: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Through the model's own packing of tiles: unpadded, resized, with row ends."""
    config = anatomy.config
    name = (
        "vision_aspect_ratio"
        if hasattr(config, "vision_aspect_ratio")
        else "vision_feature_select_strategy"
    )
    features, _ = anatomy.composite.pack_image_features(
        [parts.permute(1, 2, 0)],
        inputs["image_sizes"],
        image_newline=parts.new_zeros(len(parts)),
        **{name: getattr(config, name)},
    )
    packed: Tensor = features[0].T
    return packed


def _merged(anatomy: Anatomy, parts: Tensor, tokens: int) -> Tensor:
    """Square blocks of each tile's patches become one token."""
    from torch.nn import functional

    regions, tiles, patches = parts.shape
    side, short = math.isqrt(patches), math.isqrt(tokens // tiles)
    if side * side != patches or short * short * tiles != tokens or side % short:
        raise _unknown(anatomy, f"{tiles} x {patches} patches become {tokens} tokens")
    grid = parts.view(regions, tiles, side, side)
    return functional.avg_pool2d(grid, side // short).flatten(1)


def _unknown(anatomy: Anatomy, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"Which image token of {anatomy.family_name} shows which part of a picture is not known: "
        f"{reason}.",
        advice="Score the format `sequence` only, whose images need no map; or choose a model of "
        f"one of these types: {', '.join(sorted(KNOWN))}.",
    )
