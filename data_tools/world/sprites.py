"""Sprites: small pictures of every class in every art style, read from the shipped sheets.

A sprite is kept as premultiplied colour and alpha and scaled by area averaging. Scaled sprites are
cached; the cache only saves time, no result depends on what is in it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.world.categories import INDEX

SHEETS = Path(__file__).parent / "sheets"
VISIBLE_ALPHA = 128
"""A pixel belongs to an object from this alpha (0..255) on: at least half of it is covered."""
CACHED_SPRITES = 8192
"""About 50 MB when full: every sprite of the three training styles in most of its sizes."""


class Sprite(NamedTuple):
    """A sprite in one size; h and w in pixels."""

    colour: NDArray[np.float32]
    """[h, w, 3], 0..255, premultiplied with alpha."""
    transparency: NDArray[np.float32]
    """[h, w, 1], 1 - alpha, 0..1."""
    solid: NDArray[np.bool_]
    """[h, w], where the sprite counts as the object."""


Box = tuple[int, int, int, int]
"""x, y, width, height in pixels of a sheet."""


@cache
def _index() -> dict[str, list[dict[str, Any]]]:
    index: dict[str, list[dict[str, Any]]] = json.loads((SHEETS / "index.json").read_text("utf-8"))
    return index


def styles() -> tuple[str, ...]:
    """Names of the art styles that are shipped."""
    return tuple(_index())


@cache
def boxes(style: str) -> tuple[tuple[Box, ...], ...]:
    """Where the pictures of each class (position in `CATEGORIES`) are on a style's sheet.

    Raises:
        ValueError: No sheet has this name.
    """
    if style not in _index():
        raise ValueError(f"unknown art style {style!r}; styles are {', '.join(styles())}")
    pictures: list[list[Box]] = [[] for _ in INDEX]
    for entry in _index()[style]:
        x, y, width, height = entry["box"]
        pictures[INDEX[entry["class"]]].append((x, y, width, height))
    return tuple(tuple(p) for p in pictures)


@cache
def _sheet(style: str) -> Image.Image:
    """Sheet of a style with premultiplied colours, so that averaging needs no further care."""
    with Image.open(SHEETS / f"{style}.webp") as image:
        return image.convert("RGBA").convert("RGBa")


@lru_cache(maxsize=CACHED_SPRITES)
def sprite(style: str, category: int, picture: int, width: int, height: int) -> Sprite:
    """One sprite scaled to a size in pixels.

    Args:
        style: Name of the art style.
        category: Position of the class in `CATEGORIES`.
        picture: Which of the class's pictures, see `boxes`.
        width: Wanted width.
        height: Wanted height.
    """
    x, y, w, h = boxes(style)[category][picture]
    cut = _sheet(style).crop((x, y, x + w, y + h))
    pixels = np.asarray(cut.resize((width, height), Image.Resampling.BOX))
    alpha = pixels[..., 3]
    # The most opaque pixel always counts, so that a thin fork of eight pixels is never invisible.
    solid = alpha >= min(VISIBLE_ALPHA, int(alpha.max()))
    colour = pixels[..., :3].astype(np.float32)
    transparency = (1 - alpha[..., None] / 255).astype(np.float32)
    for array in (colour, transparency, solid):
        array.setflags(write=False)
    return Sprite(colour, transparency, solid)


def cache_info() -> Mapping[str, int]:
    """Hits, misses and size of the sprite cache."""
    return sprite.cache_info()._asdict()


def clear_cache() -> None:
    """Forget all scaled sprites (for measurements and tests)."""
    sprite.cache_clear()
