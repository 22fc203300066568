"""Clock math: two hands point at two numbers, which are added or multiplied."""

from __future__ import annotations

import functools
import math
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_tools.micl import drawing
from data_tools.micl.tasks import Latent, Params, Split, Task, pick

__all__ = ["Clock"]

SUPPORT = 40  # of the 132 ordered pairs; the other 92 are asked
BLUE, RED, GREY = (31, 60, 220), (220, 30, 30), (60, 60, 60)


class Clock(Task):
    """A short thick blue hand at p, a long thin red one at q; the answer is p + q or p x q.

    The numbers that the hands point at have the hands' colours. The 132 pairs with p != q are
    split once for all.
    """

    name = "clock"
    type = "mathematical reasoning"
    question = "What is the result of this image?"
    answers = "number"

    def latents(self, rng: np.random.Generator) -> tuple[Latent, ...]:
        """The two operators that were seen in the published examples."""
        return ("+", "x")

    def item(self, rng: np.random.Generator, split: Split) -> Params:
        """A pair of the split."""
        p, q = pick(rng, _pairs(split))
        return {"p": p, "q": q}

    def answer(self, params: Params, latent: Latent) -> str:
        """The result."""
        p, q = params["p"], params["q"]
        return str(p + q if latent == "+" else p * q)

    def draw(self, params: Params) -> Image.Image:
        """Numerals in a circle without a rim, and the hands."""
        picture = drawing.blank()
        canvas = ImageDraw.Draw(picture)
        hands = {params["p"]: (BLUE, 0.50, 12), params["q"]: (RED, 0.72, 4)}
        for number, (colour, length, width) in hands.items():
            canvas.line([_at(0, 0), _at(number, length)], colour, width)
        for number in range(1, 13):
            colour = hands[number][0] if number in hands else GREY
            at = _at(number, 0.88)
            drawing.text(canvas, at, str(number), 34, colour, bold=number in hands)
        return picture


def _at(number: int, length: float) -> tuple[float, float]:
    """A point in the direction of a number; ``length`` as a share of the radius."""
    middle = drawing.SIDE / 2
    angle = math.pi * number / 6
    radius = length * middle
    return middle + radius * math.sin(angle), middle - radius * math.cos(angle)


@functools.cache
def _pairs(split: Split) -> tuple[Any, ...]:
    pairs = [(p, q) for p in range(1, 13) for q in range(1, 13) if p != q]
    order = np.random.default_rng(0).permutation(len(pairs))
    chosen = order[:SUPPORT] if split == "support" else order[SUPPORT:]
    return tuple(pairs[int(index)] for index in chosen)
