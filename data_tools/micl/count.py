"""Counting objects with a hidden attribute: how many red ones, or squares, or large ones?"""

from __future__ import annotations

import numpy as np
from PIL import Image

from data_tools.micl import drawing
from data_tools.micl.tasks import Latent, Params, Split, Task

__all__ = ["Count"]

ATTRIBUTES = {
    "shape": ("circle", "square", "triangle"),
    "colour": ("red", "blue", "green", "yellow", "black", "purple"),
    "size": ("large", "small"),
}
LATENTS = tuple(f"{name}={value}" for name, values in ATTRIBUTES.items() for value in values)
MOST = 6  # larger counts are not asked
GRID = 4  # objects stand in different cells, so that none hides another
RADIUS = {"large": 0.42, "small": 0.24}  # of a cell


class Count(Task):
    """3 to 9 flat objects of 3 shapes, 6 colours and 2 sizes; a stand-in for CLEVR's pictures.

    The latent is one value of one attribute; the answer, 1 to 6, how many objects have it.
    """

    name = "count"
    type = "concept binding"
    question = "How many are there in this image?"
    answers = "number"

    def latents(self, rng: np.random.Generator) -> tuple[Latent, ...]:
        """The eleven values."""
        return LATENTS

    def item(self, rng: np.random.Generator, split: Split) -> Params:
        """Objects of which at least two latents give different counts.

        Values come in clusters: with six colours drawn evenly, most counts would be one or none.
        """
        while True:
            palette = {
                name: rng.permutation(len(values))[: 2 + int(rng.integers(2))]
                for name, values in ATTRIBUTES.items()
            }
            count = int(rng.integers(3, 10))
            cells = rng.permutation(GRID * GRID)[:count]
            objects = [
                {
                    "cell": int(cell),
                    **{
                        name: ATTRIBUTES[name][int(rng.choice(palette[name]))]
                        for name in ATTRIBUTES
                    },
                }
                for cell in cells
            ]
            params = {"objects": objects}
            if len({self.answer(params, latent) for latent in LATENTS} - {"0"}) >= 2:
                return params

    def allows(self, params: Params, latent: Latent) -> bool:
        """Counts from 1 to 6."""
        return 1 <= int(self.answer(params, latent)) <= MOST

    def answer(self, params: Params, latent: Latent) -> str:
        """How many objects have the value."""
        name, _, value = latent.partition("=")
        return str(sum(one[name] == value for one in params["objects"]))

    def draw(self, params: Params) -> Image.Image:
        """Objects in the cells of a grid, on light grey."""
        picture = drawing.blank(colour="#eeeeee")
        cell = drawing.SIDE / GRID
        for one in params["objects"]:
            row, column = divmod(one["cell"], GRID)
            centre = ((column + 0.5) * cell, (row + 0.5) * cell)
            radius = RADIUS[one["size"]] * cell
            drawing.shape(picture, one["shape"], centre, radius, drawing.COLOURS[one["colour"]])
        return picture
