"""Pictures of the COCO classes that no emoji shows, drawn with a few shapes each.

Thirteen classes have no emoji at all, two (snowboard, surfboard) only one that shows a person,
and one style's tennis emoji lacks the racket.
Every drawing lives on a square of 100 units; it is rasterised four times too large and averaged
down, and its colours come from a `Palette`, one per art style, so that a style stays a style.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
UNITS = 100


@dataclass(frozen=True)
class Palette:
    """Colours of one style.

    Attributes:
        metal: Body of appliances.
        dark: Screens, gaps and wheels.
        accent: The colour that makes a thing recognisable (hydrant, hair drier).
        second: Second vivid colour (boards).
        wood: Bats, tables, benches.
        leather: Gloves.
        outline: Contour, or None for a style without contours.
    """

    metal: Colour
    dark: Colour
    accent: Colour
    second: Colour
    wood: Colour
    leather: Colour
    outline: Colour | None


PALETTES: dict[str, Palette] = {
    "noto": Palette(
        (196, 206, 212), (62, 70, 76), (229, 57, 53), (3, 155, 229), (178, 118, 70),
        (161, 84, 38), (90, 98, 104),
    ),
    "fluent_flat": Palette(
        (225, 228, 238), (50, 49, 60), (248, 49, 47), (0, 166, 237), (211, 136, 61),
        (165, 105, 83), None,
    ),
    "fluent_3d": Palette(
        (208, 212, 228), (74, 70, 92), (240, 80, 96), (70, 140, 240), (196, 140, 96),
        (176, 100, 76), (150, 146, 170),
    ),
    "twemoji": Palette(
        (204, 214, 221), (41, 47, 51), (221, 46, 68), (59, 136, 195), (193, 105, 79),
        (138, 75, 56), None,
    ),
}  # fmt: skip


def _lighter(colour: Colour, amount: float) -> Colour:
    """Mix with white (amount > 0) or with black (amount < 0)."""
    target = 255 if amount > 0 else 0
    red, green, blue = (round(c + (target - c) * abs(amount)) for c in colour)
    return red, green, blue


class _Pen:
    """Thin layer over `ImageDraw` in units of the 100 x 100 square."""

    def __init__(self, draw: ImageDraw.ImageDraw, scale: float, palette: Palette) -> None:
        self.draw = draw
        self.scale = scale
        self.p = palette
        self.width = max(1, round(1.6 * scale))

    def _points(self, *values: float) -> list[float]:
        return [v * self.scale for v in values]

    def rect(self, x0: float, y0: float, x1: float, y1: float, fill: Colour, r: float = 3) -> None:
        self.draw.rounded_rectangle(
            self._points(x0, y0, x1, y1), r * self.scale, fill, self.p.outline, self.width
        )

    def bar(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        """Rectangle without contour, for details."""
        self.draw.rectangle(self._points(x0, y0, x1, y1), fill)

    def oval(self, x0: float, y0: float, x1: float, y1: float, fill: Colour) -> None:
        self.draw.ellipse(self._points(x0, y0, x1, y1), fill, self.p.outline, self.width)

    def poly(self, *values: float, fill: Colour) -> None:
        self.draw.polygon(self._points(*values), fill, self.p.outline, self.width)

    def line(self, *values: float, fill: Colour, width: float) -> None:
        self.draw.line(self._points(*values), fill, round(width * self.scale), joint="curve")


def _fire_hydrant(d: _Pen) -> None:
    red, dark = d.p.accent, _lighter(d.p.accent, -0.25)
    d.rect(22, 44, 78, 58, dark)
    d.oval(14, 41, 28, 61, d.p.metal)
    d.oval(72, 41, 86, 61, d.p.metal)
    d.rect(32, 28, 68, 88, red)
    d.oval(30, 10, 70, 42, red)
    d.rect(44, 3, 56, 14, dark)
    d.rect(26, 26, 74, 35, dark)
    d.oval(40, 42, 60, 62, d.p.metal)
    d.rect(24, 86, 76, 97, dark)


def _parking_meter(d: _Pen) -> None:
    d.rect(45, 52, 55, 97, d.p.dark)
    d.rect(34, 92, 66, 98, d.p.dark)
    d.rect(29, 22, 71, 60, _lighter(d.p.second, -0.3), 6)
    d.oval(29, 2, 71, 44, _lighter(d.p.second, -0.3))
    d.oval(35, 8, 65, 38, _lighter(d.p.metal, 0.6))
    d.line(50, 26, 60, 15, fill=d.p.accent, width=4)
    d.rect(40, 44, 60, 49, d.p.dark, 1)


def _bench(d: _Pen) -> None:
    for x in (12, 82):
        d.rect(x, 18, x + 6, 88, d.p.dark, 1)
    for y in (20, 32, 44):
        d.rect(4, y, 96, y + 9, d.p.wood, 2)
    d.poly(4, 58, 96, 58, 100, 70, 0, 70, fill=_lighter(d.p.wood, 0.2))
    for x in (6, 88):
        d.rect(x, 70, x + 6, 90, d.p.dark, 1)


def _baseball_bat(d: _Pen) -> None:
    d.line(14, 86, 40, 60, fill=_lighter(d.p.wood, -0.1), width=8)
    d.poly(36, 58, 42, 64, 70, 44, 92, 22, 97, 8, 92, 3, 78, 8, 56, 30, fill=d.p.wood)
    d.line(52, 45, 88, 12, fill=_lighter(d.p.wood, 0.35), width=4)
    d.line(14, 86, 26, 74, fill=d.p.dark, width=9)
    d.oval(6, 82, 18, 94, _lighter(d.p.wood, -0.2))


def _baseball_glove(d: _Pen) -> None:
    tan, deep = d.p.leather, _lighter(d.p.leather, -0.25)
    for x0, y0, x1, y1 in ((20, 16, 38, 66), (37, 4, 55, 60), (54, 4, 72, 60), (70, 14, 88, 64)):
        d.rect(x0, y0, x1, y1, tan, 9)
    d.oval(2, 40, 36, 76, tan)
    d.oval(14, 40, 90, 98, tan)
    d.oval(28, 46, 76, 88, deep)
    for x in (37, 54, 70):
        d.line(x, 22, x, 56, fill=deep, width=2.5)
    d.oval(38, 52, 64, 78, _lighter(d.p.metal, 0.75))
    d.line(44, 55, 48, 75, fill=d.p.accent, width=2)


def _dining_table(d: _Pen) -> None:
    deep = _lighter(d.p.wood, -0.25)
    for x in (12, 80):
        d.rect(x, 46, x + 8, 94, deep, 1)
    for x in (26, 66):
        d.rect(x, 44, x + 7, 80, _lighter(d.p.wood, -0.4), 1)
    d.poly(18, 24, 82, 24, 98, 44, 2, 44, fill=_lighter(d.p.wood, 0.15))
    d.rect(2, 44, 98, 53, d.p.wood, 2)


def _remote(d: _Pen) -> None:
    d.rect(32, 2, 68, 98, d.p.dark, 9)
    d.oval(42, 8, 58, 22, d.p.accent)
    d.oval(38, 27, 62, 49, _lighter(d.p.metal, 0.1))
    d.oval(45, 33, 55, 43, d.p.dark)
    for row, y in enumerate((56, 68, 80)):
        for x in (37, 46, 55):
            d.bar(x, y, x + 6, y + 7, d.p.second if row == 2 else d.p.metal)


def _microwave(d: _Pen) -> None:
    d.rect(2, 22, 98, 80, d.p.metal, 4)
    d.rect(8, 29, 68, 73, d.p.dark)
    d.bar(14, 36, 62, 66, _lighter(d.p.dark, 0.2))
    d.line(22, 60, 40, 40, fill=_lighter(d.p.dark, 0.5), width=4)
    d.bar(75, 30, 93, 38, (90, 220, 140))
    for y in (44, 54, 64):
        for x in (75, 86):
            d.bar(x, y, x + 7, y + 6, d.p.dark)
    for x in (10, 80):
        d.bar(x, 80, x + 10, 84, d.p.dark)


def _oven(d: _Pen) -> None:
    d.rect(10, 4, 90, 96, d.p.metal, 3)
    for x in (20, 62):
        d.oval(x, 0, x + 20, 9, d.p.dark)
    d.bar(13, 9, 87, 25, _lighter(d.p.metal, -0.25))
    for x in (20, 38, 56, 72):
        d.oval(x, 11, x + 11, 22, d.p.dark)
    d.rect(17, 32, 83, 38, d.p.dark, 2)
    d.rect(19, 44, 81, 84, d.p.dark)
    d.bar(26, 51, 74, 77, (235, 150, 60))
    d.line(28, 64, 72, 64, fill=d.p.dark, width=3)


def _toaster(d: _Pen) -> None:
    bread = (226, 172, 104)
    d.rect(26, 12, 50, 50, bread, 8)
    d.rect(54, 12, 78, 50, bread, 8)
    d.rect(8, 36, 92, 88, d.p.metal, 14)
    d.bar(20, 38, 84, 43, d.p.dark)
    d.rect(90, 50, 98, 62, d.p.dark, 2)
    d.oval(66, 62, 80, 76, d.p.accent)
    for x in (16, 74):
        d.bar(x, 88, x + 10, 93, d.p.dark)


def _sink(d: _Pen) -> None:
    steel = _lighter(d.p.metal, -0.3)
    d.line(50, 50, 50, 14, 52, 8, 70, 8, 72, 14, 72, 26, fill=steel, width=8)
    d.oval(26, 36, 40, 48, d.p.second)
    d.oval(62, 36, 76, 48, d.p.accent)
    d.rect(2, 46, 98, 56, _lighter(d.p.metal, 0.5), 3)
    d.poly(8, 56, 92, 56, 80, 84, 20, 84, fill=_lighter(d.p.metal, 0.2))
    d.rect(40, 84, 60, 98, steel, 1)


def _refrigerator(d: _Pen) -> None:
    body = _lighter(d.p.metal, 0.25)
    d.rect(22, 1, 78, 95, body, 5)
    d.bar(24, 33, 76, 37, _lighter(d.p.dark, 0.2))
    d.rect(30, 12, 35, 29, d.p.dark, 1)
    d.rect(30, 43, 35, 68, d.p.dark, 1)
    d.bar(56, 44, 69, 56, d.p.second)
    for x in (26, 66):
        d.bar(x, 95, x + 8, 99, d.p.dark)


def _hair_drier(d: _Pen) -> None:
    pink = _lighter(d.p.accent, 0.25)
    d.poly(46, 50, 66, 50, 60, 96, 42, 96, fill=_lighter(d.p.accent, -0.2))
    d.poly(2, 16, 44, 20, 44, 50, 2, 54, fill=d.p.dark)
    d.oval(34, 8, 92, 62, pink)
    d.oval(56, 20, 82, 48, _lighter(d.p.dark, 0.15))
    d.oval(63, 27, 75, 41, d.p.metal)
    d.rect(47, 62, 55, 76, d.p.metal, 2)


def _snowboard(d: _Pen) -> None:
    d.draw.line(d._points(22, 80, 80, 22), d.p.second, round(26 * d.scale))
    d.oval(8, 67, 35, 94, d.p.second)
    d.oval(66, 6, 93, 33, d.p.second)
    d.line(20, 82, 82, 20, fill=d.p.second, width=24)
    d.line(22, 80, 80, 22, fill=_lighter(d.p.second, 0.6), width=5)
    for x in (30, 56):
        y = 100 - x - 16
        d.line(x - 6, y - 6, x + 18, y + 18, fill=d.p.dark, width=10)


def _surfboard(d: _Pen) -> None:
    d.oval(30, 1, 70, 99, _lighter(d.p.accent, 0.15))
    d.oval(37, 10, 63, 90, (250, 214, 90))
    d.line(50, 2, 50, 98, fill=_lighter(d.p.dark, 0.1), width=3)
    d.bar(37, 44, 63, 54, d.p.second)
    d.poly(46, 84, 54, 84, 50, 98, fill=d.p.dark)


def _tennis_racket(d: _Pen) -> None:
    d.line(8, 92, 36, 64, fill=d.p.dark, width=9)
    d.line(34, 66, 50, 50, fill=d.p.accent, width=6)
    d.oval(36, 4, 96, 64, d.p.accent)
    d.oval(43, 11, 89, 57, _lighter(d.p.metal, 0.7))
    for v in (24, 34, 44):
        d.line(46, v, 86, v, fill=_lighter(d.p.metal, -0.2), width=1.5)
        d.line(v + 32, 14, v + 32, 54, fill=_lighter(d.p.metal, -0.2), width=1.5)


DRAWINGS: dict[str, Callable[[_Pen], None]] = {
    "fire hydrant": _fire_hydrant,
    "parking meter": _parking_meter,
    "bench": _bench,
    "snowboard": _snowboard,
    "baseball bat": _baseball_bat,
    "baseball glove": _baseball_glove,
    "surfboard": _surfboard,
    "dining table": _dining_table,
    "remote": _remote,
    "microwave": _microwave,
    "oven": _oven,
    "toaster": _toaster,
    "sink": _sink,
    "refrigerator": _refrigerator,
    "hair drier": _hair_drier,
    "tennis racket": _tennis_racket,
}


def draw(name: str, style: str, size: int) -> Image.Image:
    """Draw one class.

    Args:
        name: A key of `DRAWINGS`.
        style: A key of `PALETTES`.
        size: Side of the returned square in pixels; choose four times the wanted size.

    Returns:
        RGBA picture, straight alpha.
    """
    image = Image.new("RGBA", (size, size), (0, 0, 0, 0))
    DRAWINGS[name](_Pen(ImageDraw.Draw(image), size / (UNITS + 1), PALETTES[style]))
    return image
