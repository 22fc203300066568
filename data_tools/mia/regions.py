"""Which tokens of a composed picture show which of its tiles.

A mask of each tile, white on black, is sent through the very processor that prepares the composed
picture; how bright a token is tells which part of it shows the tile (:mod:`mmlm.token_brightness`).

For parity there is the authors' split of the token grid into equal blocks (Liuziyu77/MIA-DPO,
commit a85c51a), which knows neither labels nor padding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmlm.errors import UnsupportedModel
from mmlm.token_brightness import KNOWN, brightness

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["KNOWN", "Tile", "central_square", "equal_blocks", "region_sums", "tile_shares"]

Tile = Sequence[int]
"""``[x0, y0, x1, y1]`` in pixels, the right and lower border excluded."""
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
    from PIL import Image

    masks = [Image.new("RGB", size) for _ in range(1 + len(tiles))]
    for mask, (x0, y0, x1, y1) in zip(masks, [(0, 0, *size), *tiles], strict=True):
        mask.paste((255, 255, 255), (x0, y0, x1, y1))
    try:
        found = brightness(model, processor, masks).mean(1)
    except UnsupportedModel as error:
        raise UnsupportedModel(
            str(error),
            advice="Score the format `sequence` only, whose images need no map; or choose a model "
            f"of one of these types: {', '.join(sorted(KNOWN))}.",
        ) from error
    return found.clamp(0, 1)  # sharp resampling overshoots at borders
