"""When a training saves, evaluates and stops early: settings, without a heavy import."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

__all__ = ["Saving"]


@dataclass(frozen=True, kw_only=True)
class Saving:
    """When a training saves, evaluates and stops early.

    Attributes:
        every: optimiser steps between two checkpoints; with `best` or `patience` it is evaluated
            as often. The last step is always saved.
        keep: newest checkpoints that stay. The last one stays in any case, and so does the best.
        best: metric of the evaluation that chooses the checkpoint to end with, such as "loss" or
            "rewards/margins"; None ends with the last.
        greater_is_better: of that metric.
        patience: evaluations without a gain after which the training stops; None never stops.
        min_gain: what counts as a gain.

    Raises:
        ValueError: a value is out of its range, or `patience` without a metric.
    """

    every: int = 100
    keep: int = 2
    best: str | None = None
    greater_is_better: bool = False
    patience: int | None = None
    min_gain: float = 0.0

    def __post_init__(self) -> None:
        for name in ("every", "keep", "patience"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")
        if not 0 <= self.min_gain < math.inf:
            raise ValueError(f"min_gain = {self.min_gain}: must be 0 or more, and finite")
        if self.patience is not None and self.best is None:
            raise ValueError("patience needs a metric to watch: give `best`, for example loss")

    @property
    def evaluates(self) -> bool:
        """Whether there must be data to evaluate on."""
        return self.best is not None

    def arguments(self) -> dict[str, Any]:
        """The arguments of `transformers.TrainingArguments` that say the same."""
        values: dict[str, Any] = {
            "save_strategy": "steps",
            "save_steps": self.every,
            # Ours counts only complete checkpoints, see `training.checkpoints`.
            "save_total_limit": None,
        }
        if self.best is not None:
            values |= {
                "eval_strategy": "steps",
                "eval_steps": self.every,
                "load_best_model_at_end": True,
                "metric_for_best_model": self.best,
                "greater_is_better": self.greater_is_better,
                # A resumed run has had the same patience as an uninterrupted one.
                "restore_callback_states_from_checkpoint": self.patience is not None,
            }
        return values

    def callbacks(self) -> list[TrainerCallback]:
        """Makes checkpoints complete, and stops early if that is wanted."""
        from transformers import EarlyStoppingCallback

        from training.checkpoints import CompleteCheckpoints

        made: list[TrainerCallback] = [CompleteCheckpoints(self.keep)]
        if self.patience is not None:
            made.append(EarlyStoppingCallback(self.patience, self.min_gain))
        return made
