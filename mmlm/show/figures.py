"""Figures of what a model did: matplotlib, light background, colours that everybody tells apart.

Maps are drawn in viridis, whose brightness alone carries the order, over a grey picture, so that
no colour of the picture is taken for attention. Every function gets plain numbers and returns a
picture or a figure; nothing here runs a model.
"""

from __future__ import annotations

import textwrap
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmlm.errors import InputError

if TYPE_CHECKING:
    from pathlib import Path

    import numpy as np
    from matplotlib.figure import Figure
    from PIL import Image

__all__ = ["HEADS", "MAP", "Panel", "Tile", "heads", "layers", "overlay", "save", "sheet"]

MAP = "viridis"
"""Colour map of attention over pictures."""
HEADS = "cividis"
"""Colour map of heads."""
_DPI = 144
#: Told apart by colour (Okabe and Ito), by brightness, by line and by mark.
_STYLES: tuple[dict[str, str], ...] = (
    {"color": "#0072B2", "linestyle": "-", "marker": "o"},
    {"color": "#D55E00", "linestyle": "--", "marker": "s"},
    {"color": "#009E73", "linestyle": ":", "marker": "^"},
    {"color": "#CC79A7", "linestyle": "-.", "marker": "D"},
)
_SIDE = 480
"""Pixels of the longer side of a map over a picture; small pictures are enlarged to it."""


def overlay(
    picture: Image.Image, values: np.ndarray, *, peak: float | None = None, side: int = _SIDE
) -> Image.Image:
    """Attention over a picture: the picture in dim grey, yellow where the model looked most.

    Each cell stays a cell: a smooth map would show more than was measured.

    Args:
        picture: The picture.
        values: [rows, columns], >= 0: :meth:`mmlm.show.looking.Look.of_span`.
        peak: The value of the brightest colour. None: the largest of ``values``. Give the same
            number to maps that are to be compared.
        side: Pixels of the longer side of the result, >= 1.

    Returns:
        RGB.

    Raises:
        InputError: If the map is not two-dimensional, or holds numbers below 0 or none at all.
    """
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.size or not (values >= 0).all():
        raise InputError(
            f"A map of shape {values.shape} cannot be laid over a picture.",
            advice="Give [rows, columns] of numbers from 0 on, such as Look.of_span returns.",
        )
    top = float(values.max()) if peak is None else peak
    level = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.BICUBIC), np.float32)
    grey = np.repeat((0.1 + 0.65 * grey / 255)[..., None], 3, -1)
    cells = _enlarged(level, size)
    cover = 0.85 * cells[..., None]
    shown = grey * (1 - cover) + colormaps[MAP](cells)[..., :3] * cover
    return Image.fromarray(np.round(255 * shown).clip(0, 255).astype(np.uint8))


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of cells as pixels [height, width], each pixel that of the cell it lies in."""
    import numpy as np

    width, height = size
    down = np.arange(height) * values.shape[0] // height
    across = np.arange(width) * values.shape[1] // width
    return values[down][:, across]


@dataclass(frozen=True)
class Panel:
    """One diagram over the layers of a model.

    Attributes:
        title: What it shows, as a sentence.
        unit: Label of the vertical axis.
        curves: By name, layer -> value; None where the value is undefined.
        even: A value at which a line is drawn: neither more nor less.
        logarithmic: Whether the vertical axis is, if values differ by more than a factor of 10.
    """

    title: str
    unit: str
    curves: Mapping[str, Mapping[int, float | None]]
    even: float | None = None
    logarithmic: bool = False


def layers(panels: Sequence[Panel]) -> Figure:
    """Diagrams over the layers, one below another, a curve for each answer.

    Args:
        panels: At least one.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _figure(7.2, 0.4 + 2.3 * len(panels))
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        for (name, curve), style in zip(panel.curves.items(), _STYLES, strict=False):
            values = [float("nan") if v is None else v for v in curve.values()]
            axes.plot(list(curve), values, label=name, **style)
        if panel.even is not None:
            axes.axhline(panel.even, color="#777777", linewidth=0.8, zorder=0)
        found = [v for curve in panel.curves.values() for v in curve.values() if v]
        if panel.logarithmic and max(found) > 10 * min(found):
            axes.set_yscale("log")
        else:
            axes.set_ylim(0, 1.12 * max([*found, panel.even or 0]) or None)
        axes.set_title(panel.title, loc="left", fontsize=10)
        axes.set_ylabel(panel.unit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(axis="y", linewidth=0.4, color="#dddddd")
        axes.spines[["top", "right"]].set_visible(False)
    grid[-1].set_xlabel("decoder layer")
    if any(len(panel.curves) > 1 for panel in panels):
        grid[0].legend(frameon=False, fontsize=8.5)
    return figure


def heads(maps: Mapping[str, np.ndarray], numbers: Sequence[int], label: str) -> Figure:
    """Maps of all attention heads, side by side with one scale.

    Args:
        maps: By name [layers, heads], >= 0.
        numbers: The layers' numbers.
        label: What a value is.
    """
    from matplotlib.ticker import MaxNLocator

    rows, columns = next(iter(maps.values())).shape
    width, height = max(0.22 * columns, 1.6), max(0.22 * rows, 1.2)
    figure = _figure((width + 0.7) * len(maps) + 1.0, height + 1.1)
    grid = figure.subplots(1, len(maps), sharey=True, squeeze=False)[0]
    top = max(float(values.max()) for values in maps.values()) or 1.0
    for axes, (name, values) in zip(grid, maps.items(), strict=True):
        drawn = axes.imshow(values, cmap=HEADS, vmin=0, vmax=top, aspect="equal")
        axes.set_title(_wrapped(name, max(int(width / 0.085), 16)), fontsize=9)
        axes.set_xlabel("head")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        step = max(1, -(-rows // 16))
        axes.set_yticks(range(0, rows, step), [str(n) for n in numbers[::step]])
    grid[0].set_ylabel("decoder layer")
    figure.colorbar(drawn, ax=list(grid), label=label, shrink=0.85)
    return figure


@dataclass(frozen=True)
class Tile:
    """A picture in a sheet.

    Attributes:
        title: Above it.
        image: The picture; None leaves the place empty.
        note: Below it.
    """

    title: str
    image: Image.Image | None
    note: str = ""


def sheet(rows: Mapping[str, Sequence[Tile]]) -> Figure:
    """Rows of pictures, each row with its name above it.

    Args:
        rows: By name, tiles from left to right; at least one.
    """
    columns = max(len(tiles) for tiles in rows.values())
    images = [tile.image for tiles in rows.values() for tile in tiles if tile.image is not None]
    tallest = max((image.height / image.width for image in images), default=1.0)
    notes = {tile.note: _wrapped(tile.note, 28) for tiles in rows.values() for tile in tiles}
    more_lines = max(note.count("\n") for note in notes.values())
    height = 0.7 + 1.65 * tallest + 0.16 * more_lines
    figure = _figure(1.75 * columns, height * len(rows))
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (name, tiles) in zip(parts, rows.items(), strict=True):
        style = {"fontsize": 10, "fontweight": "bold", "parse_math": False}
        part.suptitle(name, x=0.01, ha="left", **style)
        for axes, tile in zip(part.subplots(1, columns, squeeze=False)[0], tiles, strict=False):
            if tile.image is not None:
                axes.imshow(tile.image)
            axes.set_title(tile.title, fontsize=9.5, parse_math=False)
            axes.set_xlabel(notes[tile.note], fontsize=8, color="#555555")
        for axes in part.axes:
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
    return figure


def save(figure: Figure, path: Path) -> None:
    """Writes a figure; the same figure gives the same file.

    Args:
        figure: The figure.
        path: ``.png`` or ``.svg``.
    """
    import matplotlib

    with (
        matplotlib.rc_context({"svg.hashsalt": "mmlm", "svg.fonttype": "none"}),
        warnings.catch_warnings(),
    ):
        # Words may be of any script; a sign that the font lacks is a box, and no news to anybody.
        warnings.filterwarnings("ignore", "Glyph .* missing from font")
        kind = {"Date": None} if path.suffix == ".svg" else {"Software": None}
        figure.savefig(path, dpi=_DPI, facecolor="white", metadata=kind)


def _figure(width: float, height: float) -> Figure:
    # Not pyplot: it keeps figures in a list that all threads share.
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def _wrapped(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width))
