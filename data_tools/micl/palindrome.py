"""Palindrome: five digits and a question mark; which digit makes them read the same backwards?"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from data_tools.micl import drawing
from data_tools.micl.tasks import Latent, Params, Split, Task

__all__ = ["Palindrome"]

COLOURS = ("blue", "green", "pink", "black", "purple")
WIDTH, HEIGHT = 420, 120


class Palindrome(Task):
    """d1 d2 d3 d3 d2 ? in random colours; the answer is d1.

    The rule never changes, so that the demonstrations are not needed. Colours mean nothing.
    """

    name = "palindrome"
    type = "pattern finding"
    question = "Which digit belongs at the question mark?"
    answers = "number"
    has_latent = False

    def latents(self, rng: np.random.Generator) -> tuple[Latent, ...]:
        """The one rule."""
        return ("rule",)

    def item(self, rng: np.random.Generator, split: Split) -> Params:
        """Digits and colours; the sum of the digits is odd in support and even in query items."""
        while True:
            digits = [int(digit) for digit in rng.integers(10, size=3)]
            if sum(digits) % 2 == (split == "support"):
                colours = [COLOURS[int(index)] for index in rng.integers(len(COLOURS), size=5)]
                return {"digits": digits, "colours": colours}

    def answer(self, params: Params, latent: Latent) -> str:
        """The first digit."""
        return str(params["digits"][0])

    def draw(self, params: Params) -> Image.Image:
        """One line of digits with a red question mark."""
        picture = drawing.blank(WIDTH, HEIGHT)
        canvas = ImageDraw.Draw(picture)
        first, second, third = params["digits"]
        signs = [str(digit) for digit in (first, second, third, third, second)]
        colours = [drawing.COLOURS[name] for name in params["colours"]]
        for place, (sign, colour) in enumerate(
            zip([*signs, "?"], [*colours, drawing.COLOURS["red"]], strict=True)
        ):
            at = ((place + 0.5) * WIDTH / 6, HEIGHT / 2)
            drawing.text(canvas, at, sign, 72, colour)
        return picture
