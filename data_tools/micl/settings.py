"""Which episodes are made: one set of values, checked once."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from data_tools.micl import TASKS
from data_tools.micl.episodes import CONDITIONS, Condition
from data_tools.micl.tasks import SPLITS, Split

__all__ = ["MiclSettings"]


@dataclass(frozen=True)
class MiclSettings:
    """Which episodes are made.

    Attributes:
        tasks: Names of the tasks: operator, clock, outlier, count, sudoku, palindrome, character.
        n: Episodes per task; the paper's tables have 100.
        shots: Demonstrations per episode; 0 to 32.
        split: Where queries come from: query for tests, support for training.
        condition: What is left of the demonstrations: full, zero_shot, no_images, shuffled_labels
            or shuffled_images. The queries are the same under all of them.
        demos: random, or nearest: those whose pixels resemble the query most (RICES).
        hard: The harder form of sudoku.
        seed: Seed of the episodes; not negative.
    """

    tasks: tuple[str, ...] = field(default=tuple(TASKS), metadata={"alias": "--task"})
    n: int = 100
    shots: int = 4
    split: Split = "query"
    condition: Condition = "full"
    demos: Literal["random", "nearest"] = "random"
    hard: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: Names the field and what is allowed.
        """
        if not self.tasks or (unknown := [name for name in self.tasks if name not in TASKS]):
            given = repr(unknown[0]) if self.tasks else "none"
            raise ValueError(f"tasks must be among {', '.join(TASKS)}; got {given}")
        if len(set(self.tasks)) < len(self.tasks):
            raise ValueError(f"tasks must differ; got {', '.join(self.tasks)}")
        for name, low, high in (("n", 1, 10**6), ("shots", 0, 32), ("seed", 0, 2**31)):
            if not low <= getattr(self, name) <= high:
                raise ValueError(
                    f"{name} must be from {low} to {high}; got {getattr(self, name)!r}"
                )
        for name, allowed in (
            ("split", SPLITS),
            ("condition", CONDITIONS),
            ("demos", ("random", "nearest")),
        ):
            if getattr(self, name) not in allowed:
                raise ValueError(
                    f"{name} must be one of {', '.join(allowed)}; got {getattr(self, name)!r}"
                )
        if self.shots == 1 and "character" in self.tasks and self.demos == "random":
            raise ValueError("shots must be 0 or at least 2 for character: it has two faces")
