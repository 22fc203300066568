"""Two rows of a pair as one: the common prefix once, then what is left of chosen and rejected.

    chosen    p p p p c c c -          packed    p p p p c c c r r
    rejected  p p p p r r - -

Each answer sees the prefix and itself, and keeps the position ids of its own row, so a causal
decoder computes for every position what it would compute in the plain rows. Pure functions of
tensors; who calls them is :mod:`training.fast.shared_prefix`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training.errors import FastPathRefused

__all__ = ["CHOSEN", "NOTHING", "PREFIX", "REJECTED", "PackedPairs"]

NOTHING, PREFIX, CHOSEN, REJECTED = -1, 0, 1, 2


@dataclass(frozen=True, eq=False)
class PackedPairs:
    """Where B packed rows of L positions come from, and how to get 2B rows of S back.

    Attributes:
        row: int64 [B, L]; row of the plain batch that a packed position is taken from.
        col: int64 [B, L]; its column there, which is also its distance from the row's beginning.
        part: int8 [B, L]; what the position belongs to: PREFIX, CHOSEN, REJECTED or NOTHING.
        back: int64 [2B, S]; column of the packed row that holds each plain position. Padding, whose
            states nobody scores, gets column 0.
    """

    row: Tensor
    col: Tensor
    part: Tensor
    back: Tensor

    @classmethod
    def of(cls, ids: Tensor, mask: Tensor, scored: Tensor) -> PackedPairs:
        """Packs rows [chosen; rejected].

        The prefix of a pair is what both rows have in common before the first scored token of
        either.

        Args:
            ids: int64 [2B, S]; token ids, padded on the right.
            mask: [2B, S]; 1 on tokens, 0 on padding.
            scored: [2B, S]; 1 on tokens that the loss scores.

        Raises:
            FastPathRefused: If these are no pairs with a common prefix, or padded on the left.
        """
        real = mask.bool()
        if ids.ndim != 2 or ids.shape[0] % 2 or real.shape != ids.shape:
            raise FastPathRefused(
                "shared_prefix: input_ids and attention_mask must both be [2B, S], got "
                f"{tuple(ids.shape)} and {tuple(mask.shape)}.",
                advice="Pass the batch of a preference collator: chosen rows, then rejected rows.",
            )
        if bool((~real[:, :-1] & real[:, 1:]).any()):
            raise FastPathRefused(
                "shared_prefix: the rows are padded on the left or have holes.",
                advice="Preference collators pad on the right; use ours or TRL's.",
            )
        pairs, width = ids.shape[0] // 2, ids.shape[1]
        same = (ids[:pairs] == ids[pairs:]) & real[:pairs] & real[pairs:]
        before = (scored.bool().cumsum(1) == 0).view(2, pairs, width).all(0)
        prefix = (same & before).long().cumprod(1).sum(1)
        if bool((prefix == 0).any()):
            raise FastPathRefused(
                "shared_prefix: the two rows of a pair have no token in common at their beginning.",
                advice="Row i and row B + i must answer the same prompt.",
            )
        chosen, rejected = real.sum(1).view(2, pairs)
        return cls._of_lengths(prefix, chosen, rejected, width)

    @classmethod
    def _of_lengths(
        cls, prefix: Tensor, chosen: Tensor, rejected: Tensor, width: int
    ) -> PackedPairs:
        """Packs pairs of known lengths [B], the prefix being part of both rows' lengths."""
        device, pairs = prefix.device, len(prefix)
        total = chosen + rejected - prefix
        j = torch.arange(int(total.max()), device=device)[None]
        p, c, end = prefix[:, None], chosen[:, None], total[:, None]
        second = (j >= c) & (j < end)
        part = torch.where(j < p, PREFIX, torch.where(j < c, CHOSEN, REJECTED))
        part = torch.where(j < end, part, NOTHING).to(torch.int8)
        first_row = torch.arange(pairs, device=device)[:, None]
        row = torch.where(second, first_row + pairs, first_row)
        col = torch.where(second, j - c + p, torch.where(j < c, j, 0))
        s = torch.arange(width, device=device)[None]
        back_chosen = torch.where(s < c, s, 0)
        back_rejected = torch.where(s < p, s, s - p + c)
        back_rejected = torch.where(s < rejected[:, None], back_rejected, 0)
        return cls(row, col, part, torch.cat([back_chosen, back_rejected]))

    @property
    def real(self) -> Tensor:
        """Bool [B, L]: everything but padding."""
        return self.part != NOTHING

    def pack(self, x: Tensor) -> Tensor:
        """Values [..., 2B, S] of the plain rows in packed order: [..., B, L]."""
        return x[..., self.row, self.col]

    def unpack(self, y: Tensor) -> Tensor:
        """Packed states [B, L, D] in the plain rows' order: [2B, S, D]."""
        pairs = torch.arange(len(self.row), device=y.device).repeat(2)
        return y[pairs[:, None], self.back.to(y.device)]

    def seen(self, window: int | None = None, opened: Tensor | None = None) -> Tensor:
        """Which keys each position sees: bool [B, L, L].

        Args:
            window: How many positions of its own plain row, itself included, a query sees.
            opened: bool, broadcastable to [B, L, L]; what a family opens beyond causal, as it does
                between the positions of one picture. Both answers stay apart all the same.
        """
        part, length = self.part, self.part.shape[1]
        index = torch.arange(length, device=part.device)
        allowed = index[:, None] >= index[None]
        if opened is not None:
            allowed = allowed | opened
        key, query = part[:, None, :], part[:, :, None]
        allowed = allowed & (key != NOTHING) & ((key == PREFIX) | (key == query))
        if window is not None:
            allowed = allowed & (self.col[:, None, :] > self.col[:, :, None] - window)
        # A query that sees nothing at all would be NaN in some kernels; padding sees itself.
        return allowed | (index[:, None] == index[None])
