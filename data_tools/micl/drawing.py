"""What the tasks' pictures share: a font that needs no file, colours, shapes."""

from __future__ import annotations

import functools
import math

from PIL import Image, ImageDraw, ImageFont

__all__ = ["COLOURS", "SHAPES", "SIDE", "blank", "font", "shape", "text"]

SIDE = 336  # pixels: what CLIP's larger tower reads
SMOOTH = 2  # shapes are drawn larger and scaled down: Pillow draws them without smooth edges

COLOURS = {
    "red": (214, 39, 40),
    "blue": (31, 90, 200),
    "green": (30, 140, 50),
    "yellow": (235, 190, 10),
    "black": (20, 20, 20),
    "purple": (130, 50, 160),
    "pink": (235, 110, 170),
}
SHAPES = ("circle", "square", "triangle", "star")


@functools.lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """The scalable font inside Pillow (Aileron), so that no file can be missing.

    Args:
        size: Height in pixels.
    """
    found = ImageFont.load_default(size)
    if not isinstance(found, ImageFont.FreeTypeFont):
        raise RuntimeError("Pillow was built without FreeType; install the ordinary wheel")
    return found


def blank(width: int = SIDE, height: int = SIDE, colour: str = "white") -> Image.Image:
    """An empty picture."""
    return Image.new("RGB", (width, height), colour)


def text(
    canvas: ImageDraw.ImageDraw,
    centre: tuple[float, float],
    words: str,
    size: int,
    colour: tuple[int, int, int] = (0, 0, 0),
    *,
    bold: bool = False,
) -> None:
    """Writes words around a point.

    Args:
        canvas: Where to draw.
        centre: The point in pixels.
        words: What to write.
        size: Height in pixels.
        colour: RGB.
        bold: Thicker strokes.
    """
    width = max(1, size // 24) if bold else 0
    canvas.text(centre, words, colour, font(size), anchor="mm", stroke_width=width)


def shape(
    picture: Image.Image,
    kind: str,
    centre: tuple[float, float],
    radius: float,
    colour: tuple[int, int, int],
) -> None:
    """Draws a filled shape with smooth edges.

    Args:
        picture: Changed in place.
        kind: One of `SHAPES`.
        centre: Its middle, in pixels.
        radius: From the middle to the corners.
        colour: RGB.

    Raises:
        ValueError: For an unknown shape.
    """
    side = int(2 * radius) + 4
    mask = Image.new("L", (side * SMOOTH, side * SMOOTH))
    canvas = ImageDraw.Draw(mask)
    middle, r = side * SMOOTH / 2, radius * SMOOTH
    if kind == "circle":
        canvas.ellipse([middle - r, middle - r, middle + r, middle + r], fill=255)
    else:
        corners = {"square": 4, "triangle": 3, "star": 10}
        if kind not in corners:
            raise ValueError(f"shape must be one of {', '.join(SHAPES)}, got {kind!r}")
        canvas.polygon(_corners(kind, corners[kind], middle, r), fill=255)
    mask = mask.resize((side, side), Image.Resampling.BOX)
    place = (round(centre[0] - side / 2), round(centre[1] - side / 2))
    picture.paste(Image.new("RGB", mask.size, colour), place, mask)


def _corners(kind: str, count: int, middle: float, radius: float) -> list[tuple[float, float]]:
    turn = math.pi / 4 if kind == "square" else 0.0
    points = []
    for number in range(count):
        r = radius * 0.42 if kind == "star" and number % 2 else radius
        angle = turn - math.pi / 2 + 2 * math.pi * number / count
        points.append((middle + r * math.cos(angle), middle + r * math.sin(angle)))
    return points
