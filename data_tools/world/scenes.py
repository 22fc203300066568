"""Scenes: the theme, the style, and what stands where.

`scene` draws the truth, `painting.render` makes its picture. Both are functions of (configuration,
split, seed, index) alone: any scene can be drawn at any time, in any process, and nothing has to be
stored.
"""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.world.categories import LONG_SIDE, NAMES, size_group
from data_tools.world.sprites import boxes, styles
from data_tools.world.themes import THEMES, Theme, swapped

MAX_INSTANCES = 9
TRIES = 14
"""Random positions tried for an object."""
FREE_OVERLAP = 0.10
"""A position with less overlap (share of the smaller box) is taken at once."""
DROP_OVERLAP = 0.45
"""An object whose best position overlaps more is dropped from picture and truth."""
SKY = 0.15
"""Big objects stay below this fraction of the height."""
COUNT_THRESHOLDS = (0.80, 0.95)
"""A class has one instance with 0.8, two with 0.15 and three with 0.05."""
BASE_SIZE = 80
"""Side of the picture, in pixels, that `LONG_SIDE` refers to."""


@dataclass(frozen=True, kw_only=True)
class WorldConfig:
    """Settings of the world.

    Attributes:
        size: Side of the square picture in pixels, at least 32.
        styles: Art styles; each picture uses one.
        inclusion_factor: Multiplies every inclusion probability of the theme tables, in (0, 1].
            Below 1 companions are missing more often than the prior says.
        swap_themes: Take the classes from another theme's table than the background shows.
        surprise: Probability of one additional class from outside the table, in [0, 1].
        label_noise: Probability that a caption names one absent class of the theme, in [0, 1]:
            the way instruction data written by a bigger model teaches invention.
        noise_sigma: Standard deviation of the grey pixel noise, of 255.
        object_scale: Multiplies the size of every object, in (0, 1.5].
        decorrelated: Share of scenes, in [0, 1], whose classes are as many as the theme would
            give, but drawn from all classes alike: there the prior says nothing, and only looking
            helps. For training.

    Raises:
        ValueError: A value is out of its range.
    """

    size: int = BASE_SIZE
    styles: tuple[str, ...] = ("noto", "fluent_flat", "fluent_3d")
    inclusion_factor: float = 1.0
    swap_themes: bool = False
    surprise: float = 0.15
    label_noise: float = 0.0
    noise_sigma: float = 5.0
    object_scale: float = 1.0
    decorrelated: float = 0.0

    def __post_init__(self) -> None:
        if self.size < 32:
            raise ValueError(f"size = {self.size}; a picture has at least 32 pixels a side")
        unknown = [s for s in self.styles if s not in styles()]
        if unknown or not self.styles:
            raise ValueError(f"styles = {self.styles!r}; give one or more of {styles()}")
        for name, low, high in (
            ("inclusion_factor", 0.0, 1.0),
            ("surprise", 0.0, 1.0),
            ("label_noise", 0.0, 1.0),
            ("noise_sigma", 0.0, 255.0),
            ("object_scale", 0.0, 1.5),
            ("decorrelated", 0.0, 1.0),
        ):
            value = getattr(self, name)
            if not low <= value <= high:
                raise ValueError(f"{name} = {value}; give a number from {low:g} to {high:g}")
        if self.inclusion_factor == 0 or self.object_scale == 0:
            raise ValueError("inclusion_factor and object_scale must be above 0")


SPLITS: dict[str, WorldConfig] = {
    "train": WorldConfig(),
    "natural": WorldConfig(),
    "counterfactual": WorldConfig(inclusion_factor=0.5),
    "heldout_style": WorldConfig(styles=("twemoji",)),
    "swapped": WorldConfig(swap_themes=True),
}
"""Split name -> settings. Splits with equal settings still show different scenes."""


class Instance(NamedTuple):
    """One object of a scene; the box is in whole pixels."""

    category: int
    """Position in `CATEGORIES` (not the COCO id)."""
    picture: int
    """Which of the class's pictures."""
    x: int
    y: int
    width: int
    height: int
    flip: bool

    @property
    def name(self) -> str:
        """Class name."""
        return NAMES[self.category]

    @property
    def box(self) -> tuple[int, int, int, int]:
        """x, y, width, height."""
        return self.x, self.y, self.width, self.height

    @property
    def centre(self) -> tuple[float, float]:
        """x, y of the middle."""
        return self.x + self.width / 2, self.y + self.height / 2


@dataclass(frozen=True)
class Scene:
    """The truth about one picture.

    Attributes:
        config: Settings it was drawn with.
        split: Name of the split.
        seed: Seed of the run.
        index: Number of the scene.
        theme: Name of the theme that background and sentences show.
        style: Art style.
        instances: Objects in painting order, largest first; a later one may cover an earlier one.
    """

    config: WorldConfig
    split: str
    seed: int
    index: int
    theme: str
    style: str
    instances: tuple[Instance, ...]

    @property
    def classes(self) -> frozenset[str]:
        """Names of the classes in the picture."""
        return frozenset(NAMES[i.category] for i in self.instances)


def stream(split: str, seed: int, index: int, *more: int) -> np.random.Generator:
    """The random stream of a scene, or with further numbers an independent one beside it."""
    return np.random.default_rng([seed, zlib.crc32(split.encode()), index, *more])


class _Table(NamedTuple):
    """A theme's classes as arrays."""

    categories: tuple[int, ...]
    probabilities: NDArray[np.float64]
    outside: tuple[int, ...]


def _table(theme: Theme) -> _Table:
    categories = tuple(NAMES.index(name) for name in theme.classes)
    outside = tuple(c for c in range(len(NAMES)) if c not in categories)
    return _Table(categories, np.array(list(theme.classes.values())), outside)


_TABLES: dict[str, _Table] = {theme.name: _table(theme) for theme in THEMES}
_LONG_SIDES = tuple(LONG_SIDE[size_group(name)] for name in NAMES)
_IS_BIG = tuple(size_group(name) == "big" for name in NAMES)


def scene(config: WorldConfig, seed: int, index: int, split: str = "train") -> Scene:
    """Draw the truth of one scene.

    Args:
        config: Settings, usually `SPLITS[split]`.
        seed: Seed of the run, not negative.
        index: Number of the scene, not negative.
        split: Name that separates the scenes of different splits; part of the random stream.

    Returns:
        The scene, with at least one object.

    Raises:
        ValueError: Negative seed or index.
    """
    if seed < 0 or index < 0:
        raise ValueError(f"seed = {seed}, index = {index}; neither may be negative")
    rng = stream(split, seed, index)
    theme = THEMES[int(rng.random() * len(THEMES))]
    style = config.styles[int(rng.random() * len(config.styles))]
    source = swapped(theme) if config.swap_themes else theme
    categories = _draw_categories(rng, config, _TABLES[source.name])
    instances = _place(rng, config, _draw_sizes(rng, config, style, categories))
    return Scene(config, split, seed, index, theme.name, style, tuple(instances))


def _draw_categories(rng: np.random.Generator, config: WorldConfig, table: _Table) -> list[int]:
    """Class of every instance. A scene without any class is drawn again: it has no caption."""
    # A share of zero draws nothing, so that scenes do not depend on this setting's existence.
    decorrelated = config.decorrelated > 0 and rng.random() < config.decorrelated
    chosen: list[int] = []
    while not chosen:
        draws = rng.random(len(table.categories))
        included = draws < table.probabilities * config.inclusion_factor
        chosen = [c for c, yes in zip(table.categories, included.tolist(), strict=True) if yes]
        surprise = rng.random(2)
        if surprise[0] < config.surprise:
            chosen.append(table.outside[int(surprise[1] * len(table.outside))])
    if decorrelated:
        chosen = rng.choice(len(NAMES), len(chosen), replace=False).tolist()
    result: list[int] = []
    for category, draw in zip(chosen, rng.random(len(chosen)).tolist(), strict=True):
        result += [category] * (1 + sum(draw >= t for t in COUNT_THRESHOLDS))
    if len(result) > MAX_INSTANCES:
        result = [result[i] for i in rng.permutation(len(result))[:MAX_INSTANCES].tolist()]
    return result


def _draw_sizes(
    rng: np.random.Generator, config: WorldConfig, style: str, categories: list[int]
) -> list[Instance]:
    """Picture, flip and size of every instance, not yet placed, largest first."""
    scale = config.size / BASE_SIZE * config.object_scale
    drawn = []
    for category, (which, side, flip) in zip(
        categories, rng.random((len(categories), 3)).tolist(), strict=True
    ):
        pictures = boxes(style)[category]
        picture = int(which * len(pictures))
        low, high = _LONG_SIDES[category]
        long_side = (low + int(side * (high - low + 1))) * scale
        _, _, width, height = pictures[picture]
        ratio = long_side / max(width, height)
        w, h = max(1, round(width * ratio)), max(1, round(height * ratio))
        drawn.append(Instance(category, picture, 0, 0, w, h, flip < 0.5))
    drawn.sort(key=lambda i: -i.width * i.height)
    return drawn


def _place(
    rng: np.random.Generator, config: WorldConfig, unplaced: list[Instance]
) -> list[Instance]:
    """Give every instance a position; drop those that would cover too much.

    The smaller of two boxes is the later one, or as large, so its area is the divisor.
    """
    size = config.size
    placed: list[Instance] = []
    draws = rng.random((len(unplaced), TRIES, 2)).tolist()
    for instance, tries in zip(unplaced, draws, strict=True):
        width, height = instance.width, instance.height
        top = math.ceil(SKY * size) if _IS_BIG[instance.category] else 0
        span_x, span_y = size - width + 1, size - height - top + 1
        limit = width * height
        best, best_overlap = (0, 0), float("inf")
        for u, v in tries:
            x, y = int(u * span_x), top + int(v * span_y)
            overlap = _largest_overlap(placed, x, y, width, height) / limit
            if overlap < best_overlap:
                best, best_overlap = (x, y), overlap
                if overlap < FREE_OVERLAP:
                    break
        if best_overlap <= DROP_OVERLAP:
            placed.append(instance._replace(x=best[0], y=best[1]))
    return placed


def with_object(scene: Scene, name: str, rng: np.random.Generator) -> Scene | None:
    """The same scene with one more object; nothing else moves.

    Args:
        scene: The scene.
        name: Class of the new object.
        rng: Draws its picture, size and place.

    Returns:
        None if every place that was tried covers too much, of it or of another object.
    """
    (new,) = _draw_sizes(rng, scene.config, scene.style, [NAMES.index(name)])
    size = scene.config.size
    top = math.ceil(SKY * size) if _IS_BIG[new.category] else 0
    span_x, span_y = size - new.width + 1, size - new.height - top + 1
    best, least = new, math.inf
    for u, v in rng.random((TRIES, 2)).tolist():
        placed = new._replace(x=int(u * span_x), y=top + int(v * span_y))
        covered = max(
            _largest_overlap([other], *placed.box) / min(_area(other), _area(new))
            for other in scene.instances
        )
        if covered < least:
            best, least = placed, covered
    if least > DROP_OVERLAP:
        return None
    instances = sorted((*scene.instances, best), key=lambda i: -_area(i))
    return replace(scene, instances=tuple(instances))


def without_class(scene: Scene, name: str) -> Scene:
    """The same scene without the objects of one class."""
    return replace(scene, instances=tuple(i for i in scene.instances if i.name != name))


def _area(instance: Instance) -> int:
    return instance.width * instance.height


def _largest_overlap(placed: list[Instance], x: int, y: int, width: int, height: int) -> int:
    """Pixels that a box shares with the placed box it overlaps most."""
    right, bottom = x + width, y + height
    largest = 0
    for _, _, px, py, pw, ph, _ in placed:
        w = (right if right < px + pw else px + pw) - (x if x > px else px)
        if w > 0:
            h = (bottom if bottom < py + ph else py + ph) - (y if y > py else py)
            if h > 0 and w * h > largest:
                largest = w * h
    return largest
