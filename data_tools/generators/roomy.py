"""A cache layer that grows without being copied."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicLayer

__all__ = ["RoomyLayer"]


class RoomyLayer(DynamicLayer):
    """A cache layer with free columns at its end, so that a step copies its own columns only.

    Args:
        keys: [P, H, m, d].
        values: [P, H, m, d].
        length: How many of the m columns are in use.
    """

    _MORE = 128

    def __init__(self, keys: Tensor, values: Tensor, length: int) -> None:
        super().__init__()
        self.dtype, self.device = keys.dtype, keys.device
        self._all = (keys, values)
        self._show(length)
        self.is_initialized = True

    @property
    def shown(self) -> tuple[Tensor, Tensor]:
        """The columns in use."""
        keys, values = self._all
        return keys[:, :, : self._length], values[:, :, : self._length]

    def _show(self, length: int) -> None:
        self._length = length
        self.keys, self.values = self.shown

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Writes new columns; returns all."""
        begin = self._length
        end = begin + key_states.shape[2]
        keys, values = self._all
        if end > keys.shape[2]:
            width = end + self._MORE
            self._all = keys, values = _widened(keys, width), _widened(values, width)
        keys[:, :, begin:end] = key_states
        values[:, :, begin:end] = value_states
        self._show(end)
        return self.shown

    def keep(self, rows: Tensor) -> None:
        """Drops the other rows."""
        keys, values = self._all
        self._all = keys[rows], values[rows]
        self._show(self._length)


def _widened(x: Tensor, width: int) -> Tensor:
    wide = x.new_empty(*x.shape[:2], width, x.shape[3])
    wide[:, :, : x.shape[2]] = x
    return wide
