"""Outlier detection: which is the odd one, by colour or by shape? Only demonstrations tell."""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_tools.micl import drawing
from data_tools.micl.tasks import Latent, Params, Split, Task

__all__ = ["Outlier"]

COLOURS = ("red", "blue", "black", "green", "yellow")
PER_ROW = 5


class Outlier(Task):
    """7 to 9 shapes alike but two: one differs in colour only, one in shape only.

    The answer is the odd colour or the odd shape.
    """

    name = "outlier"
    type = "concept binding"
    question = "What is the minority element in this image?"
    answers = "word"

    def latents(self, rng: np.random.Generator) -> tuple[Latent, ...]:
        """What is asked for."""
        return ("colour", "shape")

    def item(self, rng: np.random.Generator, split: Split) -> Params:
        """Shapes, colours and places."""
        shape, odd_shape = rng.permutation(len(drawing.SHAPES))[:2]
        colour, odd_colour = rng.permutation(len(COLOURS))[:2]
        count = int(rng.integers(7, 10))
        by_colour, by_shape = rng.permutation(count)[:2]
        return {
            "shape": drawing.SHAPES[shape],
            "colour": COLOURS[colour],
            "odd_shape": drawing.SHAPES[odd_shape],
            "odd_colour": COLOURS[odd_colour],
            "count": count,
            "place_of_odd_colour": int(by_colour),
            "place_of_odd_shape": int(by_shape),
        }

    def answer(self, params: Params, latent: Latent) -> str:
        """The odd colour or shape."""
        return str(params[f"odd_{latent}"])

    def draw(self, params: Params) -> Image.Image:
        """Rows of five on white."""
        picture = drawing.blank()
        cell = drawing.SIDE / PER_ROW
        for place in range(params["count"]):
            colour = params["colour"]
            shape = params["shape"]
            if place == params["place_of_odd_colour"]:
                colour = params["odd_colour"]
            if place == params["place_of_odd_shape"]:
                shape = params["odd_shape"]
            row, column = divmod(place, PER_ROW)
            centre = ((column + 0.5) * cell, drawing.SIDE / 2 + (row - 0.5) * cell * 1.3)
            drawing.shape(picture, shape, centre, cell * 0.4, drawing.COLOURS[colour])
        return picture
