"""Several pictures drawn as one: the grid collage and the picture within a picture.

Sizes and places are those of the authors' code (Liu et al., arXiv 2410.17637). Pure Pillow; equal
pictures give equal pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from PIL import Image, ImageDraw, ImageFont, features

from data_tools.mia.records import GRID, check_number

__all__ = [
    "LABEL_SIZE",
    "MARGIN",
    "MIN_INNER",
    "SHAPES",
    "TILE",
    "Grid",
    "Inset",
    "draw_grid",
    "draw_inset",
    "fitted",
    "grid",
    "inset",
    "label_font",
]

TILE = 448
"""Side of a grid's tile in pixels (the authors')."""
MARGIN = 40
"""White pixels between columns, and height of the label band above every row (the authors')."""
LABEL_SIZE = 36
"""Height of the labels' font in pixels (the authors')."""
LABEL_OFFSET = (20, -40)
"""From a tile's corner to the corner of its label; does not follow the margin (the authors')."""
INNER_SHARE = 0.7
"""Greatest share of the outer picture's width and height that the inner one takes."""
MIN_INNER = 28
"""Inner pictures with a side of fewer pixels show nothing (ours: a patch of common encoders)."""
SHAPES = {2: (1, 2), 3: (1, 3), 4: (2, 2), 6: (2, 3), 9: (3, 3)}
"""Rows and columns of a grid of so many pictures."""

Box = tuple[int, int, int, int]


@dataclass(frozen=True)
class Grid:
    """Where everything in a collage is, in pixels.

    Attributes:
        size: Width and height of the canvas.
        tile: Width and height of a tile.
        corners: Upper left corner of every tile, row by row; the pictures are pasted there.
        labels: Text and upper left corner of every label.
    """

    size: tuple[int, int]
    tile: tuple[int, int]
    corners: tuple[tuple[int, int], ...]
    labels: tuple[tuple[str, tuple[int, int]], ...]

    @property
    def boxes(self) -> list[Box]:
        """The tiles as (x0, y0, x1, y1), right and lower border excluded."""
        width, height = self.tile
        return [(x, y, x + width, y + height) for x, y in self.corners]


@dataclass(frozen=True)
class Inset:
    """Where the inner picture is.

    Attributes:
        size: Its width and height after scaling.
        corner: Its upper left corner in the outer picture.
    """

    size: tuple[int, int]
    corner: tuple[int, int]

    @property
    def box(self) -> Box:
        """(x0, y0, x1, y1), right and lower border excluded."""
        return (*self.corner, self.corner[0] + self.size[0], self.corner[1] + self.size[1])


def grid(n_images: int, tile: tuple[int, int] = (TILE, TILE), margin: int = MARGIN) -> Grid:
    """The layout of a collage.

    Args:
        n_images: 2, 3, 4, 6 or 9.
        tile: Width and height of a tile.
        margin: Pixels between columns, and of the label band above every row.

    Raises:
        ValueError: If there is no grid of so many pictures.
    """
    check_number(GRID, n_images)
    rows, columns = SHAPES[n_images]
    width, height = tile
    corners = tuple(
        (column * (width + margin), row * (height + margin) + margin)
        for row in range(rows)
        for column in range(columns)
    )
    dx, dy = LABEL_OFFSET
    return Grid(
        size=(columns * width + (columns - 1) * margin, rows * (height + margin)),
        tile=tile,
        corners=corners,
        labels=tuple((f"Image{i}", (x + dx, y + dy)) for i, (x, y) in enumerate(corners, start=1)),
    )


def fitted(size: tuple[int, int], tile: tuple[int, int]) -> tuple[int, int]:
    """The size of a picture that fills a tile in one direction and keeps its proportions.

    Args:
        size: Width and height of the picture.
        tile: Width and height of the tile.

    Returns:
        Width and height; the side that does not fill the tile is cut to whole pixels, at least 1.
    """
    ratio = size[0] / size[1]
    if ratio > tile[0] / tile[1]:
        return tile[0], max(1, int(tile[0] / ratio))
    return max(1, int(tile[1] * ratio)), tile[1]


def inset(inner: tuple[int, int], outer: tuple[int, int]) -> Inset:
    """Where a picture goes in the middle of another.

    Args:
        inner: Width and height of the picture that is laid on the other.
        outer: Width and height of the other.
    """
    ratio = inner[0] / inner[1]
    wide, high = INNER_SHARE * outer[0], INNER_SHARE * outer[1]
    if wide / ratio <= high:
        width = int(wide)
        height = int(width / ratio)
    else:
        height = int(high)
        width = int(height * ratio)
    return Inset((width, height), ((outer[0] - width) // 2, (outer[1] - height) // 2))


def draw_grid(pictures: Sequence[Image.Image], layout: Grid, *, labels: bool = True) -> Image.Image:
    """Draws a collage: every picture at the upper left of its white tile.

    Args:
        pictures: As many as the layout has tiles, in order.
        layout: Where they go.
        labels: Whether to write "Image1" and so on above the tiles.

    Raises:
        ValueError: If the pictures are not as many as the tiles.
    """
    canvas = Image.new("RGB", layout.size, "white")
    for picture, corner in zip(pictures, layout.corners, strict=True):
        size = fitted(picture.size, layout.tile)
        canvas.paste(picture.convert("RGB").resize(size, Image.Resampling.LANCZOS), corner)
    if labels:
        draw = ImageDraw.Draw(canvas)
        for text, corner in layout.labels:
            draw.text(corner, text, fill="black", font=label_font(LABEL_SIZE))
    return canvas


def draw_inset(inner: Image.Image, outer: Image.Image, place: Inset) -> Image.Image:
    """Draws a picture on the middle of another.

    Args:
        inner: What is laid on the other.
        outer: The other; not changed.
        place: See `inset`.
    """
    canvas = outer.convert("RGB").copy()
    canvas.paste(inner.convert("RGB").resize(place.size, Image.Resampling.BICUBIC), place.corner)
    return canvas


@cache
def label_font(size: int) -> Any:
    """The font that comes inside Pillow, so that none has to be installed.

    Args:
        size: Height in pixels; a Pillow built without FreeType has one small font only.
    """
    if features.check("freetype2"):
        return ImageFont.load_default(size)
    return ImageFont.load_default_imagefont()
