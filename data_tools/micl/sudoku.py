"""Sudoku: which number is missing in a grid of consecutive ones?"""

from __future__ import annotations

import numpy as np
from PIL import Image, ImageDraw

from data_tools.micl import drawing
from data_tools.micl.tasks import Latent, Params, Split, Task

__all__ = ["Sudoku"]


class Sudoku(Task):
    """A 2 x 2 grid of n .. n+3 row by row; the second or the third is missing.

    The harder form is 3 x 3: row i starts at n + i - 1 and counts in steps of i; one number is
    missing in every row. The rule never changes, so that the demonstrations are not needed.
    """

    name = "sudoku"
    type = "pattern finding"
    question = "What is the missing number in this image?"
    answers = "number"
    has_latent = False

    def latents(self, rng: np.random.Generator) -> tuple[Latent, ...]:
        """The one rule."""
        return ("rule",)

    def item(self, rng: np.random.Generator, split: Split) -> Params:
        """A first number, and what is missing; odd first numbers are demonstrated, even asked."""
        n = 2 * int(rng.integers(50, 498)) + (split == "support")
        if self.hard:
            return {"n": n, "missing": [int(rng.integers(3)) for _ in range(3)]}
        return {"n": n, "missing": [int(rng.integers(1, 3))]}

    def answer(self, params: Params, latent: Latent) -> str:
        """The missing numbers, row by row."""
        if len(params["missing"]) == 1:
            return str(params["n"] + params["missing"][0])
        rows = enumerate(params["missing"], start=1)
        return ", ".join(str(_number(params["n"], row, column)) for row, column in rows)

    def draw(self, params: Params) -> Image.Image:
        """A grid with black lines."""
        size = 2 if len(params["missing"]) == 1 else 3
        picture = drawing.blank()
        canvas = ImageDraw.Draw(picture)
        cell = (drawing.SIDE - 16) / size
        for row in range(size):
            for column in range(size):
                left, top = 8 + column * cell, 8 + row * cell
                canvas.rectangle([left, top, left + cell, top + cell], None, (0, 0, 0), 3)
                if size == 2:
                    missing = 2 * row + column == params["missing"][0]
                    number = params["n"] + 2 * row + column
                else:
                    missing = column == params["missing"][row]
                    number = _number(params["n"], row + 1, column)
                if not missing:
                    at = (left + cell / 2, top + cell / 2)
                    drawing.text(canvas, at, str(number), int(cell / 2.6))
        return picture


def _number(n: int, row: int, column: int) -> int:
    """A number of the 3 x 3 form; rows count from 1, columns from 0."""
    return n + row - 1 + row * column
