"""Painting: from a scene to its picture and its per-pixel truth."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.world.scenes import BASE_SIZE, Scene, stream
from data_tools.world.sprites import sprite
from data_tools.world.themes import BY_NAME, Theme

HORIZON_JITTER = 0.12
"""The horizon moves by up to this fraction of the height."""
COLOUR_JITTER = 10.0
"""Standard deviation of each background colour channel, of 255."""
GRADIENT = 12.0
"""Top and bottom differ from the middle by up to this much, in opposite directions."""
MAX_CLUTTER = 3
CLUTTER_SIDE = (4, 12)
"""Smallest and largest side of a piece of clutter in pixels of a picture of 80 pixels."""
CLUTTER_OPACITY = 0.7

_PAINT_STREAM = 1
"""Appended to a scene's seed for everything that is not truth: background, clutter, noise."""
_NOISE_STREAM, _CLUTTER_STREAM = 5, 6
"""Followed by a number, for other noise and other clutter in an otherwise equal picture."""


class Picture(NamedTuple):
    """A painted scene, S = side in pixels."""

    image: NDArray[np.uint8]
    """[S, S, 3] RGB."""
    class_map: NDArray[np.uint8]
    """[S, S]: 0 background, else position in `CATEGORIES` + 1 of the topmost object."""
    instance_map: NDArray[np.uint8]
    """[S, S]: 0 background, else position in `Scene.instances` + 1 of the topmost object."""


def render(scene: Scene, *, noise: int = 0, clutter: int = 0) -> Picture:
    """Paint a scene.

    Background bands, clutter, objects in order (premultiplied alpha), grey noise. None of it
    depends on which objects there are.

    Args:
        scene: What to paint.
        noise: 0 for the scene's own noise, another number for other noise and nothing else.
        clutter: 0 for the scene's own clutter, another number for other clutter and nothing else.
    """
    config = scene.config
    size = config.size
    rng = stream(scene.split, scene.seed, scene.index, _PAINT_STREAM)
    canvas = _background(rng, BY_NAME[scene.theme], size)
    pieces = _draw_clutter(rng)  # drawn also if not used: the noise comes from the same stream
    if clutter:
        other = stream(scene.split, scene.seed, scene.index, _CLUTTER_STREAM, clutter)
        pieces = _draw_clutter(other)
    _clutter(pieces, canvas, size)
    if noise:
        rng = stream(scene.split, scene.seed, scene.index, _NOISE_STREAM, noise)
    instance_map = np.zeros((size, size), np.uint8)
    for number, i in enumerate(scene.instances, start=1):
        colour, transparency, solid = sprite(scene.style, i.category, i.picture, i.width, i.height)
        if i.flip:
            colour, transparency, solid = colour[:, ::-1], transparency[:, ::-1], solid[:, ::-1]
        area = slice(i.y, i.y + i.height), slice(i.x, i.x + i.width)
        part = canvas[area]
        part *= transparency
        part += colour
        instance_map[area][solid] = number
    if config.noise_sigma:
        grey = rng.standard_normal((size, size, 1), np.float32)
        grey *= np.float32(config.noise_sigma)
        canvas += grey
    canvas += 0.5
    image = np.clip(canvas, 0, 255, out=canvas).astype(np.uint8)
    class_of = np.array([0, *(i.category + 1 for i in scene.instances)], np.uint8)
    return Picture(image, class_of[instance_map], instance_map)


def _background(rng: np.random.Generator, theme: Theme, size: int) -> NDArray[np.float32]:
    """Two bands with jittered colours, a jittered horizon and a vertical gradient."""
    colours = np.array([theme.upper, theme.lower]) + rng.normal(0, COLOUR_JITTER, (2, 3))
    shift, tilt = (rng.random(2) * 2 - 1).tolist()
    horizon = round((theme.horizon + shift * HORIZON_JITTER) * size)
    rows = np.repeat(colours, (horizon, size - horizon), axis=0)
    rows += np.linspace(-tilt * GRADIENT, tilt * GRADIENT, size)[:, None]
    canvas = np.empty((size, size, 3), np.float32)
    canvas[:] = rows[:, None, :]
    return canvas


def _draw_clutter(rng: np.random.Generator) -> list[list[float]]:
    """Form, place, size and colour of up to three pieces, each number from 0 to 1."""
    count = int(rng.random() * (MAX_CLUTTER + 1))
    pieces: list[list[float]] = rng.random((count, 8)).tolist()
    return pieces


def _clutter(pieces: list[list[float]], canvas: NDArray[np.float32], size: int) -> None:
    """Blend unlabelled rectangles or ellipses behind the objects."""
    low, high = (side * size / BASE_SIZE for side in CLUTTER_SIDE)
    for oval, u, v, w, h, *rgb in pieces:
        width, height = round(low + w * (high - low)), round(low + h * (high - low))
        x, y = int(u * (size - width + 1)), int(v * (size - height + 1))
        opacity = np.full((height, width, 1), CLUTTER_OPACITY, np.float32)
        if oval < 0.5:
            dy = (np.arange(height)[:, None] + 0.5) / height * 2 - 1
            dx = (np.arange(width)[None, :] + 0.5) / width * 2 - 1
            opacity *= (dy**2 + dx**2 <= 1)[..., None]
        part = canvas[y : y + height, x : x + width]
        part += opacity * (np.array(rgb, np.float32) * 255 - part)
