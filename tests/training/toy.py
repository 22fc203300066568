"""A source of four colours and a model of a few thousand parameters."""

from __future__ import annotations

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState, PartialState
from numpy.typing import NDArray

from training.scratch.recipe import FromScratch, Shape
from training.scratch.source import Round

COLOURS = {"red": (255, 0, 0), "green": (0, 255, 0), "blue": (0, 0, 255)}
WORDS = sorted(
    {*COLOURS, *"user assistant : what is shown ? a the patch . there yes no , in image".split()}
)
SHAPE = Shape(
    image_size=16,
    patch_size=8,
    vision_width=16,
    vision_mlp=32,
    vision_layers=2,
    vision_heads=2,
    text_width=16,
    text_mlp=32,
    text_layers=2,
    text_heads=2,
    max_positions=64,
)


class Colours:
    """Pictures of 16 x 16 pixels: one coloured patch of four. Even texts are of one length."""

    def __init__(self, seed: int = 0, even: bool = False) -> None:
        self.seed = seed
        self.even = even

    @property
    def n_classes(self) -> int:
        return len(COLOURS)

    def vocabulary(self) -> list[str]:
        return WORDS

    def _draw(self, index):
        rng = np.random.default_rng([self.seed, index])
        return int(rng.integers(3)), int(rng.integers(4)), int(rng.integers(3)) * (not self.even)

    def content_words(self) -> list[str]:
        return list(COLOURS)

    def texts(self, index: int) -> tuple[Round, Round]:
        colour, _, extra = self._draw(index)
        name = list(COLOURS)[colour]
        caption = " ".join([f"a {name} patch ."] * (1 + extra))
        return [("what is shown ?", caption)], [
            ("is there a red patch ?", "yes" if name == "red" else "no"),
            ("is there a blue patch ?", "yes ." if name == "blue" else "no ."),
        ]

    def picture(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[int]]:
        colour, place, _ = self._draw(index)
        image = np.full((16, 16, 3), 128, np.uint8)
        classes = np.zeros((16, 16), np.uint8)
        y, x = 8 * (place // 2), 8 * (place % 2)
        image[y : y + 8, x : x + 8] = list(COLOURS.values())[colour]
        classes[y : y + 8, x : x + 8] = colour + 1
        return image, classes, [colour]


def settings(steps=6, **values):
    from training.scratch.loop import StageSettings

    return StageSettings(
        **{"steps": steps, "batch_size": 4, "learning_rate": 1e-2, "warmup_steps": 2, **values}
    )


def recipe(steps=6, **values):
    stages = {name: settings(steps) for name in ("vision", "language", "projector", "alignment")}
    given = {"source": Colours(), "max_tokens": 30, "question_tokens": 30, **stages, **values}
    return FromScratch(shape=SHAPE, **given)


def accelerator(precision="no"):
    """A fresh accelerator; the library keeps its state in singletons."""
    for state in (AcceleratorState, PartialState, GradientState):
        state._shared_state.clear()
    return Accelerator(cpu=True, mixed_precision=precision)


def run(output, precision="no", **values):
    from training.config import Run, RunSettings

    torch.manual_seed(0)
    made = Run(
        output=output,
        seed=0,
        settings=RunSettings(**{"log_every": 1, "precision": precision, **values}),
        config={"recipe": {"class_path": "toy"}, "seed": 0, "precision": precision},
        command=(),
    )
    made.__dict__["accelerator"] = accelerator(precision)  # in place of the one it would make
    return made
