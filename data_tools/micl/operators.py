"""Operator induction: "a ? b", where "?" stands for an operator that only demonstrations tell."""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from PIL import Image, ImageDraw

from data_tools.micl import drawing
from data_tools.micl.tasks import Latent, Params, Split, Task, pick

__all__ = ["Operator"]

OPERATORS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "x": lambda a, b: a * b}
SUPPORT = 40  # of the 100 pairs; the other 60 are asked


class Operator(Task):
    """Digits a and b, white on black; the answer is a + b, a - b or a x b.

    The 100 ordered pairs are split once for all: a pair that is asked is never demonstrated. Under
    "-" only pairs with a >= b are used (ours), so that no answer is negative.
    """

    name = "operator"
    type = "mathematical reasoning"
    question = "What is the result of this image?"
    answers = "number"

    def latents(self, rng: np.random.Generator) -> tuple[Latent, ...]:
        """The three operators of VL-ICL Bench."""
        return tuple(OPERATORS)

    def item(self, rng: np.random.Generator, split: Split) -> Params:
        """A pair of the split."""
        a, b = pick(rng, _pairs(split))
        return {"a": a, "b": b}

    def allows(self, params: Params, latent: Latent) -> bool:
        """No negative answers."""
        return latent != "-" or params["a"] >= params["b"]

    def answer(self, params: Params, latent: Latent) -> str:
        """The result."""
        return str(OPERATORS[latent](params["a"], params["b"]))

    def draw(self, params: Params) -> Image.Image:
        """White on black, in the middle."""
        picture = drawing.blank(colour="black")
        words = f"{params['a']} ? {params['b']}"
        middle = drawing.SIDE / 2
        drawing.text(ImageDraw.Draw(picture), (middle, middle), words, 110, (255, 255, 255))
        return picture


@functools.cache
def _pairs(split: Split) -> tuple[Any, ...]:
    pairs = [(a, b) for a in range(10) for b in range(10)]
    order = np.random.default_rng(0).permutation(len(pairs))  # one split for everybody
    chosen = order[:SUPPORT] if split == "support" else order[SUPPORT:]
    return tuple(pairs[int(index)] for index in chosen)
