"""Batches of texts of similar length, as a pure function of the step."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Generic, TypeVar

import numpy as np

__all__ = ["WINDOW", "Buckets"]

T = TypeVar("T")

WINDOW = 8
"""Batches whose examples are sorted by length together, so that little of a batch is padding."""


class Buckets(Generic[T]):
    """The examples of each step, grouped so that a batch's lengths are alike.

    Step s takes its examples from window s // 8 of the stream: the window's examples are sorted by
    length, cut into batches, and the batches shuffled. Nothing is repeated or left out.

    Args:
        draw: the example with an index.
        length: by which examples are sorted.
        batch_size: examples a batch.
        seed: of the shuffling.
    """

    def __init__(
        self, draw: Callable[[int], T], length: Callable[[T], int], batch_size: int, seed: int
    ) -> None:
        self._draw, self._length = draw, length
        self._batch_size, self._seed = batch_size, seed
        self._window = lru_cache(maxsize=1)(self._cut)

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[tuple[int, T]]:
        """(index, example) of the share of a step's batch that one of several processes takes."""
        return self._window(step // WINDOW)[step % WINDOW][rank::world_size]

    def _cut(self, window: int) -> list[list[tuple[int, T]]]:
        size = WINDOW * self._batch_size
        drawn = [(i, self._draw(i)) for i in range(window * size, (window + 1) * size)]
        drawn.sort(key=lambda pair: self._length(pair[1]))
        starts = np.random.default_rng([self._seed, window]).permutation(WINDOW) * self._batch_size
        return [drawn[start : start + self._batch_size] for start in starts]
