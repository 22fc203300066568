"""The world as an endless, indexable stream of training examples.

The training program finds this class by its dotted path in a YAML file; it knows only the
protocol `training.scratch.source.Source`. Everything is drawn on the fly and nothing is repeated.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from data_tools.world.categories import INDEX, NAMES
from data_tools.world.language import (
    CAPTION_QUESTIONS,
    NUMBERS,
    caption,
    plural,
    questions,
    singular,
    vocabulary,
)
from data_tools.world.painting import render
from data_tools.world.scenes import SPLITS, Scene, WorldConfig, scene

__all__ = ["WorldStream"]

_TEXT_STREAM = 2
"""Sets the random numbers of the texts apart from those of the scenes."""


class WorldStream:
    """Pictures, class maps and conversations of the embedded world, by index.

    Args:
        seed: of the stream; with `split` it decides every scene.
        split: name under which scenes are drawn; streams of different splits share no scene.
        world: settings of the world; None takes those of the split.
        questions_per_picture: turns of the question round.
        caption_questions: how many of the world's caption questions are used, from the first.

    Raises:
        ValueError: an unknown split without settings of its own, or a count out of range.
    """

    def __init__(
        self,
        seed: int = 0,
        split: str = "train",
        world: WorldConfig | None = None,
        questions_per_picture: int = 5,
        caption_questions: int = len(CAPTION_QUESTIONS),
    ) -> None:
        if world is None and split not in SPLITS:
            raise ValueError(f"split {split!r} is unknown: take one of {sorted(SPLITS)}")
        if not 1 <= caption_questions <= len(CAPTION_QUESTIONS):
            raise ValueError(
                f"caption_questions = {caption_questions}: must be 1 to {len(CAPTION_QUESTIONS)}"
            )
        self.seed = seed
        self.split = split
        self.world = SPLITS[split] if world is None else world
        self.questions_per_picture = questions_per_picture
        self.caption_questions = caption_questions
        # A picture follows its texts after a window of batches: keep the scenes in between.
        self._scene = lru_cache(maxsize=4096)(self._draw)

    @property
    def n_classes(self) -> int:
        """COCO's 80 classes."""
        return len(NAMES)

    def vocabulary(self) -> list[str]:
        """All words of captions, questions, answers and conversations."""
        return vocabulary()

    def content_words(self) -> list[str]:
        """Names of the classes, yes and no, numbers, and where things are."""
        texts = [*NAMES, *map(singular, NAMES), *map(plural, NAMES), *NUMBERS, "yes no"]
        texts.append("left right middle above below")
        functional = {"of", "pair", "pairs", "piece", "pieces"}
        return sorted({word for text in texts for word in text.split()} - functional)

    def texts(self, index: int) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """A caption round of one turn and a question round of several."""
        drawn = self._scene(index)
        rng = np.random.default_rng(
            [_TEXT_STREAM, zlib.crc32(self.split.encode()), self.seed, index]
        )
        asked = CAPTION_QUESTIONS[int(rng.integers(self.caption_questions))]
        described = [(asked, caption(drawn, rng))]
        return described, questions(drawn, rng, self.questions_per_picture)

    def picture(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[int]]:
        """The picture [S, S, 3], its class map [S, S] and the classes in it, from 0."""
        drawn = self._scene(index)
        painted = render(drawn)
        return painted.image, painted.class_map, sorted(INDEX[name] for name in drawn.classes)

    def _draw(self, index: int) -> Scene:
        return scene(self.world, self.seed, index, self.split)
