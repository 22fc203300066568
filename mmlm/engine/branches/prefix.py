"""Beginnings that auxiliary prompts have in common with prompts whose cache is filled already.

A prompt without its question is, up to the question's first word, another prompt of the same step:
image and all. Its keys and values there are taken from that one's cache, and only the rest is run.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache

from mmlm.engine.branches.blocks import take, take_columns

__all__ = ["Beginning", "Filled", "common_beginning", "copied"]

#: Fewer columns in common than this are not worth a pass of another shape.
_WORTH = 8


@dataclass(frozen=True, eq=False)
class Filled:
    """Rows of a filled cache.

    Attributes:
        layers: (keys, values) of each layer, [B, H, m, d].
        mask: bool [B, m], True on positions that may be attended to.
        positions: Position ids [..., B, m].
        origin: int64 [B, m], each column's position in the main prompt, -1 elsewhere.
    """

    layers: Sequence[tuple[Tensor, Tensor]]
    mask: Tensor
    positions: Tensor
    origin: Tensor


@dataclass(frozen=True, eq=False)
class Beginning:
    """What a prompt has in common with a filled one.

    Attributes:
        source: The filled one.
        theirs: int64 [B], its first column.
        ours: int64 [B], the prompt's first column.
        count: int64 [B], number of columns in common.
        length: The largest count.
        rest: How many columns at the prompt's end hold all of the rest, in every row.
    """

    source: Filled
    theirs: Tensor
    ours: Tensor
    count: Tensor
    length: int
    rest: int

    def columns(self, first: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Columns [B, length] in common, right-aligned, and which of them are meant."""
        offset = torch.arange(length, device=first.device) - length
        wanted = offset >= -self.count[:, None]
        return ((first + self.count)[:, None] + offset).clamp(min=0), wanted

    def whole(self, n: int, length: int, rest: int) -> tuple[Tensor, Tensor]:
        """The prompt's columns [B, length + rest]: what is in common, then its last ones.

        Args:
            n: The prompt's length.
            length: Columns given to what is in common, at least :attr:`length`.
            rest: Columns given to the rest, at least :attr:`rest`.

        Returns:
            The columns, and which of them are meant: each of the prompt's own once.
        """
        begun, wanted = self.columns(self.ours, length)
        behind = torch.arange(n - rest, n, device=begun.device).expand(len(begun), -1)
        not_begun = behind >= (self.ours + self.count)[:, None]
        return torch.cat([begun, behind], dim=1), torch.cat([wanted, not_begun], dim=1)


def common_beginning(
    mask: Tensor, positions: Tensor, origin: Tensor, source: Filled
) -> Beginning | None:
    """The columns at each row's start that have the same token, place and visibility in both.

    The last column is never among them: its logits are wanted.

    Args:
        mask: bool [B, n], as in :class:`Filled`.
        positions: [..., B, n].
        origin: int64 [B, n].
        source: The filled prompt.

    Returns:
        None if there is too little in common.
    """
    ours, theirs = _first(mask, origin), _first(source.mask, source.origin)
    n, m = mask.shape[1], source.mask.shape[1]
    step = torch.arange(min(n - 1, m), device=mask.device)
    a, b = ours[:, None] + step, theirs[:, None] + step
    inside = (a < n - 1) & (b < m)
    a, b = a.clamp(max=n - 1), b.clamp(max=m - 1)
    same = inside & (origin.gather(1, a) == source.origin.gather(1, b)) & (origin.gather(1, a) >= 0)
    same &= mask.gather(1, a) == source.mask.gather(1, b)
    placed = take(positions, a) == take(source.positions, b)
    same &= placed.all(0) if placed.ndim == 3 else placed
    count = same.long().cumprod(-1).sum(-1)
    rest = int((n - ours - count).max())
    if n - rest < _WORTH:
        return None
    return Beginning(source, theirs, ours, count, int(count.max()), rest)


def copied(beginnings: Sequence[Beginning], length: int, config: Any) -> DynamicCache:
    """A cache that holds the beginnings of several prompts, one below the other."""
    cache = DynamicCache(config=config)
    indices = [one.columns(one.theirs, length)[0] for one in beginnings]
    for layer in range(len(beginnings[0].source.layers)):
        pairs = [
            [take_columns(x, index) for x in one.source.layers[layer]]
            for one, index in zip(beginnings, indices, strict=True)
        ]
        keys, values = zip(*pairs, strict=True)
        cache.update(torch.cat(keys), torch.cat(values), layer)
    return cache


def _first(mask: Tensor, origin: Tensor) -> Tensor:
    """The first column of each row that is no padding."""
    return (mask | (origin >= 0)).long().argmax(-1)
