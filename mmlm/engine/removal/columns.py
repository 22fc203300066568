"""Choosing columns of a pass: which positions go on, and everything that must shrink with them.

A row that keeps fewer positions than its neighbours is padded on the left: its first columns hold
something, but no mask lets anybody see them. Pure functions of tensors; who decides is
:mod:`mmlm.engine.removal.pruning` (from a layer on) and :mod:`mmlm.engine.removal.compaction`
(before the first).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional

from mmlm.errors import LayoutError

__all__ = ["Survivors", "marked", "open_mask", "shut", "step_mask", "typed_mask"]


@dataclass(frozen=True, eq=False)
class Survivors:
    """The columns of a pass that go on.

    Attributes:
        index: int64 [B, n]; columns in order, on the right. Where a row keeps fewer than n, other
            columns stand in front of them.
        valid: bool [B, n]; False where a column only fills up the row.
        width: Number of columns that were chosen from.
        whole: Whether every entry is valid.
    """

    index: Int[Tensor, "B n"]
    valid: Bool[Tensor, "B n"]
    width: int
    whole: bool

    @classmethod
    def of(cls, alive: Bool[Tensor, "B N"]) -> Survivors:
        """Chooses the columns that are alive; rows get the length of the longest one."""
        n = int(alive.sum(-1).max())
        # A stable sort moves what leaves to the front and keeps the rest in order.
        index = alive.long().argsort(dim=1, stable=True)[:, alive.shape[1] - n :]
        valid = alive.gather(1, index)
        return cls(index, valid, alive.shape[1], bool(valid.all()))

    @property
    def length(self) -> int:
        """Number of columns n that go on."""
        return self.index.shape[1]

    def below(self, own: Bool[Tensor, "R N"]) -> Survivors:
        """These rows with others below them, of which the last n columns go on.

        Args:
            own: The columns that those rows consist of; padded on the left, at most n of them.
        """
        n, device = self.length, self.index.device
        index = torch.arange(self.width - n, self.width, device=device).expand(own.shape[0], n)
        valid = own[:, self.width - n :]
        return Survivors(
            torch.cat([self.index, index]),
            torch.cat([self.valid, valid]),
            self.width,
            self.whole and bool(valid.all()),
        )

    def take(self, x: Tensor, dim: int = 1) -> Tensor:
        """The surviving columns of ``x``, whose rows (dimension ``dim - 1``) may be one for all."""
        shape = [1] * (dim - 1) + list(self.index.shape) + [1] * (x.ndim - dim - 1)
        return torch.take_along_dim(x, self.index.view(shape), dim=dim)

    def put(self, y: Tensor, x: Tensor) -> Tensor:
        """``x`` [B, N, D] with the surviving columns replaced by ``y`` [B, n, D]."""
        index = self.index[..., None].expand_as(y)
        y = torch.where(self.valid[..., None], y, x.gather(1, index))
        return x.scatter(1, index, y)

    def take_mask(self, mask: Tensor, keys: int | None = None) -> Tensor:
        """A kernel's mask for these columns, as queries and as keys.

        Args:
            mask: [rows or 1, 1, N, K] (bool, or additive float), or the [rows, N] of a flash
                kernel.
            keys: How many keys the kernel gets (default: n). A static cache has more: its unused
                columns stand at the end, closed.
        """
        if mask.ndim == 2:
            return self.take(mask) * self.valid.to(mask.dtype)
        rest = 0 if keys is None else keys - self.length
        if mask.shape[0] != self.index.shape[0]:
            mask = mask.expand(self.index.shape[0], -1, -1, -1)
        queries = self.index[:, None, :, None].expand(-1, -1, -1, mask.shape[3])
        mask = mask.gather(2, queries)
        mask = mask.gather(3, self.index[:, None, None].expand(-1, -1, mask.shape[2], -1))
        return functional.pad(shut(mask, self.valid[:, None, None]), (0, rest), value=_closed(mask))


def marked(keep: Int[Tensor, "B n"], width: int, who: str) -> Bool[Tensor, "B N"]:
    """Columns named by ``keep``; negative entries name none.

    Raises:
        LayoutError: If an entry lies outside.
    """
    if keep.numel() and int(keep.max()) >= width:
        raise LayoutError(
            f"{who} keeps column {int(keep.max())}, but there are {width}.",
            advice="Entries are columns of the states that were given; -1 means none.",
        )
    marks = torch.zeros(keep.shape[0], width + 1, dtype=torch.bool, device=keep.device)
    keep = keep.long()
    marks.scatter_(1, torch.where(keep < 0, width, keep), True)
    return marks[:, :width]


def open_mask(mask: Tensor, where: Bool[Tensor, "..."]) -> Tensor:
    """A 4-D mask with more columns open."""
    if mask.dtype == torch.bool:
        return mask | where
    return torch.where(where, mask.new_zeros(()), mask)


def shut(mask: Tensor, seen: Bool[Tensor, "..."]) -> Tensor:
    """A 4-D mask with the columns closed that are not seen."""
    return mask & seen if mask.dtype == torch.bool else mask.masked_fill(~seen, _closed(mask))


def typed_mask(
    seen: Bool[Tensor, "B 1 L K"], implementation: str, dtype: torch.dtype
) -> Bool[Tensor, "B 1 L K"] | Tensor:
    """What may be seen as the mask that a kernel takes: additive for eager ones, else bool."""
    if not implementation.endswith("eager"):
        return seen
    zero = torch.zeros((), dtype=dtype, device=seen.device)
    return torch.where(seen, zero, torch.finfo(dtype).min)


def step_mask(
    kept: Int[Tensor, "B n"],
    whole: bool,
    span: tuple[int, int, int],
    sizes: tuple[int, int],
    bound: int | None,
    more: Callable[[Tensor, Tensor], Tensor] | None = None,
) -> Bool[Tensor, "B L K"] | None:
    """What new queries may see of a cache that lacks some of the sequence's positions.

    Args:
        kept: Positions of the prompt that the cache holds, -1 for columns that hold nothing.
        whole: Whether there are no such columns.
        span: Length of the prompt, positions before the new ones, and number of new ones.
        sizes: Number of keys that the kernel gets, and number of columns the cache has dropped in
            front, as the cache itself says.
        bound: How many positions a query sees; None: all.
        more: What is opened beyond causal, from positions of queries and of keys.

    Returns:
        None if a single query sees everything there is.
    """
    length, past, new = span
    width, offset = sizes
    later = past + new - length
    if new == 1 and whole and bound is None and (width, offset) == (kept.shape[1] + later, 0):
        return None
    tail = torch.arange(length, length + later, device=kept.device)
    columns = torch.cat([kept, tail.expand(kept.shape[0], -1)], dim=1)
    columns = columns[:, offset : offset + width]
    k = functional.pad(columns, (0, width - columns.shape[1]), value=-1)[:, None]
    q = torch.arange(past, past + new, device=kept.device)[None, :, None]
    seen = k <= q
    if bound is not None:
        seen = seen & (k > q - bound)
    if more is not None:
        seen = seen | more(q, k)
    return seen & (k >= 0)


def _closed(mask: Tensor) -> float:
    return False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
