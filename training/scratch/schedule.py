"""Learning-rate schedule: linear warm-up, then half a cosine down to a floor."""

from __future__ import annotations

import math

__all__ = ["warmup_cosine"]


def warmup_cosine(step: int, total: int, warmup: int, floor: float) -> float:
    """The factor on the peak learning rate at a step.

    Args:
        step: the step about to be made, 0 to total - 1.
        total: number of steps.
        warmup: steps of linear warm-up; the peak is reached at step `warmup - 1`.
        floor: factor that the cosine ends at, in [0, 1].
    """
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - 1 - warmup)
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
