"""Batches of rows of similar length: little padding, and still another order in every epoch."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

__all__ = ["WINDOW", "LengthBuckets"]

WINDOW = 50
"""Batches whose rows are sorted by length together (transformers' number)."""


class LengthBuckets:
    """An order of rows in which every batch holds rows of similar length: a sampler.

    The order is a function of seed and epoch: rows are shuffled, windows of 50 batches sorted by
    length, and the batches of all windows shuffled. (transformers' own sampler draws from the
    global random state, so that a resumed run, or a process that has drawn anything else before,
    gets another order.) A process takes every n-th micro-batch of it, as accelerate deals them
    out: all are different rows, and those of one step are of similar length. What fills no batch
    stands at the end.

    Args:
        lengths: Tokens of every row.
        batch_size: Rows of an optimiser step, over all processes.
        seed: Of the order.
    """

    def __init__(self, lengths: Sequence[int], batch_size: int, seed: int) -> None:
        self._lengths, self._batch_size, self._seed = lengths, batch_size, seed
        self._epoch = 0

    def __len__(self) -> int:
        return len(self._lengths)

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of an epoch; the Trainer calls it."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        draw = random.Random(f"{self._seed} {self._epoch}")
        order = list(range(len(self._lengths)))
        draw.shuffle(order)
        size = self._batch_size
        whole = len(order) // size * size
        rest = order[whole:]
        batches: list[list[int]] = []
        for first in range(0, whole, size * WINDOW):
            window = order[first : min(first + size * WINDOW, whole)]
            window.sort(key=lambda n: -self._lengths[n])
            batches += [window[n : n + size] for n in range(0, len(window), size)]
        draw.shuffle(batches)
        return iter([number for batch in batches for number in batch] + rest)
