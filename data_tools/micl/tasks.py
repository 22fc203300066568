"""What a task is: items with parameters, latents that give them answers, and a way to draw them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
from PIL import Image

__all__ = ["SPLITS", "Latent", "Params", "Split", "Task", "pick"]

Split = Literal["support", "query"]
SPLITS: tuple[Split, ...] = ("support", "query")

Params = Mapping[str, Any]
"""What is in a picture, as JSON values."""

Latent = str
"""The hidden variable of an episode, as text, e.g. "+" or "colour=red"."""


@dataclass(frozen=True)
class Task(ABC):
    """One kind of puzzle.

    An item's picture depends on its parameters only; its answer depends on the latent as well.

    Attributes:
        hard: The harder form, where a task has one.
    """

    hard: bool = False

    name: ClassVar[str]
    """On the command line and in records."""
    type: ClassVar[str]
    """TrueMICL's type: mathematical reasoning, concept binding, pattern finding, novel concept."""
    question: ClassVar[str]
    """Does not state the rule."""
    answers: ClassVar[Literal["number", "word"]]
    """How answers are compared, see `benchmarks.micl`."""
    has_latent: ClassVar[bool] = True
    """False if the rule never changes: demonstrations help, but are not needed."""

    def __post_init__(self) -> None:
        """Checks the form.

        Raises:
            ValueError: If there is no harder form.
        """
        if self.hard and self.name != "sudoku":
            raise ValueError(f"the task {self.name!r} has no harder form; only sudoku has one")

    @abstractmethod
    def latents(self, rng: np.random.Generator) -> tuple[Latent, ...]:
        """The latents among which an episode's own is drawn."""

    @abstractmethod
    def item(self, rng: np.random.Generator, split: Split) -> Params:
        """Draws an item; support and query items are never the same where items are few."""

    def item_for(
        self, rng: np.random.Generator, split: Split, latents: tuple[Latent, ...]
    ) -> Params:
        """Draws an item for an episode with these latents; by default any item."""
        return self.item(rng, split)

    def covers(self, demos: Sequence[Params], latents: tuple[Latent, ...]) -> bool:
        """Whether demonstrations show enough, besides telling the latents apart."""
        return True

    def allows(self, params: Params, latent: Latent) -> bool:
        """Whether the item may be asked under a latent; by default any may."""
        return True

    @abstractmethod
    def answer(self, params: Params, latent: Latent) -> str:
        """The answer under a latent."""

    @abstractmethod
    def draw(self, params: Params) -> Image.Image:
        """The picture, RGB; the same bytes for the same parameters."""


def pick(rng: np.random.Generator, options: tuple[Any, ...]) -> Any:
    """One of some options, evenly."""
    return options[int(rng.integers(len(options)))]
