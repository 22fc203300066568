"""Which rows of attention the methods want in the running pass."""

from __future__ import annotations

import torch
from torch import Tensor

from mmlm.engine.layout import TokenLayout
from mmlm.engine.method import Method

__all__ = ["Wanted"]


class Wanted:
    """Which new queries each method gets, and their positions.

    Attributes:
        parallel: Whether each new position is a last one, see :mod:`mmlm.engine.search`.
    """

    def __init__(self, methods: tuple[Method, ...]) -> None:
        self._methods = methods
        self.parallel = False
        self._past = 0
        self._rows = 0
        self._device = torch.device("cpu")
        self._begins: Tensor | None = None  # int64 [B]: where the text after the last image begins
        self._first = 0
        self._ragged = False
        self._index: dict[tuple[int, int], Tensor] = {}  # positions, kept for one pass

    def begin(self, layout: TokenLayout) -> None:
        """A prompt begins."""
        self._rows, self._device = layout.rows, layout.seg.device
        if any(method.rows == "tail" for method in self._methods):
            end = layout.last_image_end()
            self._begins = torch.where(layout.has_image(), end + 1, layout.length)
            self._first = int(self._begins.min())
            self._ragged = bool((self._begins != self._first).any())

    def begin_pass(self, past: int) -> None:
        """A main pass begins, behind ``past`` positions."""
        self._past = past
        self._index.clear()

    def surveys(self, i: int) -> bool:
        """Whether a method wants a look at all rows before it edits any."""
        return type(self._methods[i]).survey is not Method.survey

    def first_row(self, i: int, new: int) -> int:
        """The first of ``new`` rows that method ``i`` may get."""
        kind = self._kind(i)
        if kind == "all" or self.parallel:
            return 0
        if kind == "tail" and new > 1:
            return min(max(self._first - self._past, 0), new)
        return new - 1

    def tail_begins(self, i: int, new: int) -> Tensor | None:
        """int64 [B]: where each row's tail begins, if that differs within the running pass."""
        return self._begins if self._kind(i) == "tail" and new > 1 and self._ragged else None

    def _kind(self, i: int) -> str:
        """Which rows a method gets; scaled keys are scaled for every query."""
        method = self._methods[i]
        return "all" if "keys" in method.sites else method.rows

    def positions(self, start: int, end: int) -> Tensor:
        """Sequence positions ``start`` to ``end`` for every main row, int64 [B, R]."""
        index = self._index.get((start, end))
        if index is None:
            index = torch.arange(start, end, device=self._device).expand(self._rows, -1)
            self._index[start, end] = index
        return index
