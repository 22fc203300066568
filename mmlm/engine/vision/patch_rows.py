"""Which patches are still in a vision tower, in the two forms in which towers hold them.

Most towers have a row per tile, [T, S, D]; rows that keep fewer patches than their neighbours are
padded, and a key mask hides the padding. Towers of any resolution pack all pictures into one
sequence, [S, D], in which nothing needs padding but every picture (and window) has its own length.
Both look alike to a method: a row per tile, columns of patches, -1 where a row has none.
"""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.engine.removal.columns import Survivors, typed_mask
from mmlm.errors import LayoutError

__all__ = ["PackedRows", "TileRows"]


class TileRows:
    """States [T, S, D], a class token in front of the patches if the tower has one.

    Args:
        x: What enters the first block.
        first: Number of class tokens.
        seen: Bool [T, S]; tokens that are no padding of the tower's own, None if all are real.

    Attributes:
        numbers: int64 [T, n]; number of the patch in each column, -1 where a row has none.
        count: Patches of a tile before any left.
        cut_once: Whether any patch has left.
    """

    packed = False

    def __init__(
        self, x: Float[Tensor, "T S D"], first: int, seen: Bool[Tensor, "T S"] | None
    ) -> None:
        self.first = first
        self.tiles, self.count = x.shape[0], x.shape[1] - first
        numbers = torch.arange(self.count, device=x.device).expand(self.tiles, -1)
        if seen is not None:
            numbers = torch.where(seen[:, first:], numbers, -1)
        self.numbers = numbers
        self.whole = seen is None or bool(seen.all())
        self.cut_once = False

    @property
    def valid(self) -> Bool[Tensor, "T n"]:
        """Where a column holds a patch."""
        return self.numbers >= 0

    @property
    def sizes(self) -> list[int]:
        """Patches of each tile before any left."""
        return [self.count] * self.tiles

    def cut(self, x: Float[Tensor, "T S D"], alive: Bool[Tensor, "T n"]) -> Float[Tensor, "T s D"]:
        """The states of what stays."""
        chosen = Survivors.of(alive)
        self.numbers = self.numbers.gather(1, chosen.index).masked_fill(~chosen.valid, -1)
        self.whole, self.cut_once = chosen.whole, True
        return torch.cat([x[:, : self.first], chosen.take(x[:, self.first :])], dim=1)

    def tokens(self, states: Tensor) -> Tensor:
        """States as a row per tile; these are already."""
        return states

    def seen(self) -> Bool[Tensor, "T s"]:
        """Where a token is real, class token included."""
        ahead = self.valid.new_ones(self.tiles, self.first)
        return torch.cat([ahead, self.valid], dim=1)

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A block's arguments; what depends on the patches reaches its attention by itself."""
        return kwargs

    def attention_arguments(
        self, kwargs: dict[str, Any], implementation: str, dtype: torch.dtype
    ) -> dict[str, Any]:
        """An attention module's arguments with a mask that hides what only fills up rows."""
        if not self.cut_once:
            return kwargs
        if self.whole:
            return {**kwargs, "attention_mask": None}
        seen = self.seen()
        if "flash" in implementation:
            return {**kwargs, "attention_mask": seen.long()}
        # One row of keys for all queries: nothing of S x S is made.
        return {**kwargs, "attention_mask": typed_mask(seen[:, None, None], implementation, dtype)}

    def fits(self, x: Tensor) -> bool:
        """Whether states are of these rows."""
        return x.shape[:2] == (self.tiles, self.numbers.shape[1] + self.first)

    def restored(self, x: Float[Tensor, "T s D"]) -> Float[Tensor, "T S D"]:
        """States at the places of all patches; 0 where a patch has left."""
        spare = self.count  # what only fills up a row goes to a column that is cut off again
        place = torch.where(self.valid, self.numbers, spare)[..., None]
        patches = x[:, self.first :]
        full = x.new_zeros(self.tiles, self.count + 1, x.shape[-1])
        full = full.scatter(1, place.expand_as(patches), patches)[:, :spare]
        return torch.cat([x[:, : self.first], full], dim=1)

    def alive(self) -> Bool[Tensor, "T P"]:
        """Which patches are still there."""
        marks = torch.zeros(self.tiles, self.count + 1, dtype=torch.bool, device=self.valid.device)
        place = torch.where(self.valid, self.numbers, self.count)
        return marks.scatter(1, place, self.valid)[:, : self.count]


class PackedRows:
    """States [S, D] of all pictures, one behind the other, in the order of the tower.

    Args:
        x: What enters the first block.
        sizes: Patches of each picture.

    Attributes:
        numbers: int64 [T, n]; number of the patch within its picture, in the tower's order.
        flat: int64 [s]; the surviving places of the packed sequence.
    """

    packed = True
    first = 0

    def __init__(self, x: Float[Tensor, "S D"], sizes: list[int]) -> None:
        self.sizes, self.tiles, self.count = sizes, len(sizes), max(sizes)
        self.length = x.shape[0]
        if sum(sizes) != self.length:
            raise LayoutError(
                f"The pictures' grids hold {sum(sizes)} patches, but {self.length} enter.",
                advice="Pass the processor's pixel values and grids together.",
            )
        lengths = torch.tensor(sizes, device=x.device)
        self._starts = lengths.cumsum(0) - lengths
        column = torch.arange(self.count, device=x.device).expand(self.tiles, -1)
        self.numbers = torch.where(column < lengths[:, None], column, -1)
        self.flat = torch.arange(self.length, device=x.device)
        self.cut_once = False

    @property
    def valid(self) -> Bool[Tensor, "T n"]:
        """Where a column holds a patch."""
        return self.numbers >= 0

    @property
    def _rank(self) -> Int[Tensor, "T n"]:
        """Where each column stands in the sequence as it is now; 0 where there is none."""
        counted = self.valid.flatten().long().cumsum(0).view(self.valid.shape) - 1
        return counted.clamp(min=0)

    def tokens(self, states: Float[Tensor, "s *D"]) -> Float[Tensor, "T n *D"]:
        """States as a row per picture; anything where a row has none."""
        return states[self._rank]

    def seen(self) -> Bool[Tensor, "T n"]:
        """Where a token is real."""
        return self.valid

    def cut(self, x: Float[Tensor, "S D"], alive: Bool[Tensor, "T n"]) -> Float[Tensor, "s D"]:
        """The states of what stays."""
        stays = alive[self.valid]
        chosen = Survivors.of(alive)
        self.numbers = self.numbers.gather(1, chosen.index).masked_fill(~chosen.valid, -1)
        # Columns in order, as in a row of tiles: what fills up a row stands in front.
        self.flat, self.cut_once = self.flat[stays], True
        return x[stays]

    def arguments(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A block's arguments for what is left: lengths of its segments, rotary positions."""
        if not self.cut_once:
            return kwargs
        new = dict(kwargs)
        pair = kwargs.get("position_embeddings")
        if pair is not None:
            new["position_embeddings"] = tuple(part[self.flat] for part in pair)
        ends = kwargs.get("cu_seqlens")
        if ends is not None:
            there = torch.zeros(self.length + 1, dtype=torch.long, device=ends.device)
            there[self.flat + 1] = 1
            # Segments that lost all their patches would be empty: they are left out.
            new["cu_seqlens"] = there.cumsum(0)[ends.long()].unique_consecutive().to(ends.dtype)
            if kwargs.get("max_seqlen") is not None:
                longest = new["cu_seqlens"].diff().max()
                is_tensor = isinstance(kwargs["max_seqlen"], Tensor)
                new["max_seqlen"] = longest if is_tensor else int(longest)
        return new

    def attention_arguments(
        self, kwargs: dict[str, Any], implementation: str, dtype: torch.dtype
    ) -> dict[str, Any]:
        """An attention module's arguments: it gets them from its block."""
        return kwargs

    def features(self, unit: int) -> Int[Tensor, " u"]:
        """Places, in the tower's order, of the features that are made of ``unit`` patches each.

        Where whole units stay, these are the units. Otherwise the model joins neighbours among
        the survivors: such a feature takes the place of its first patch's unit, or the next free
        one, so the order is kept.

        Raises:
            LayoutError: If a picture's survivors are no whole number of features.
        """
        first = self.flat.view(-1, unit)[:, 0] // unit if len(self.flat) % unit == 0 else None
        if first is None or bool((self.valid.sum(-1) % unit != 0).any()):
            raise LayoutError(
                f"A method keeps patches of a picture that make no whole features of {unit}.",
                advice="Keep whole units, or a multiple of the unit.",
            )
        step = torch.arange(len(first), device=first.device)
        image = torch.bucketize(self.flat[::unit].contiguous(), self._starts, right=True)
        ends = [*(self._starts // unit)[1:].tolist(), self.length // unit]
        places = first.clone()
        for i, end in enumerate(ends):  # pictures are few
            own = (image == i + 1).nonzero().flatten()
            index = step[: len(own)]
            wanted = (first[own] - index).cummax(0).values + index
            places[own] = torch.minimum(wanted, end - len(own) + index)
        return places
