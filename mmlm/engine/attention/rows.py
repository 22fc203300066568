"""One attention call, and the rows of it that are computed a second time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["AttentionRows", "Call", "RowsOfWhatIsLeft"]


@dataclass
class Call:
    """What one attention call was given.

    Attributes:
        query: [rows, H, L, d].
        key: [rows, H_kv, K, d], as the cache returned it.
        value: Like ``key``.
        mask: None (causal), [rows or 1, 1, L, K] (bool, or additive float), or [rows, K] (flash).
        options: ``scaling``, ``sliding_window``, ``softcap`` and whatever else the kernel takes.
        apart: Keys and values stand once per query head, although the layer shares them.
    """

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    options: dict[str, Any]
    apart: bool = False

    def below(self, rows: int) -> Call:
        """The call without its first ``rows`` rows."""
        mask = self.mask
        if mask is not None and mask.shape[0] > 1:
            mask = mask[rows:]
        return Call(self.query[rows:], self.key[rows:], self.value[rows:], mask, self.options)

    def scaled(self, gain: Tensor) -> Call:
        """The call with keys times ``gain`` [rows, H, K], which are one set per query head then.

        The products are taken in fp32 (or better) and rounded once. What is in the cache stays.
        """
        groups = self.query.shape[1] // self.key.shape[1]
        product = self.key[:, :, None] * gain.unflatten(1, (-1, groups))[..., None]
        key = product.to(self.key.dtype).flatten(1, 2)
        value = self.value.repeat_interleave(groups, dim=1) if groups > 1 else self.value
        return Call(self.query, key, value, self.mask, self.options, apart=True)


class AttentionRows:
    """Scores, weights and values of one call's main rows, in sequence positions.

    Args:
        call: What the kernel was given.
        rows: Number of main rows B; rows of auxiliary branches lie below and are left out.
        past: Positions before the new ones. A static cache is cropped to the positions that exist,
            a sliding window is padded in front, so that column j is position j.
    """

    def __init__(self, call: Call, rows: int, past: int) -> None:
        self.query = call.query[:rows]
        self.past, self.new = past, call.query.shape[2]
        self.total = past + self.new
        # A static cache holds positions that do not exist yet, a window has dropped old ones.
        self.dropped = max(self.total - call.key.shape[2], 0)
        kept = self.total - self.dropped
        self.key = call.key[:rows, :, :kept]
        self.value = call.value[:rows, :, :kept]
        mask = call.mask
        self.mask = mask[:rows, ..., :kept] if mask is not None else None
        self.groups = self.query.shape[1] // self.key.shape[1]
        scaling = call.options.get("scaling")
        self.scaling: float = self.query.shape[-1] ** -0.5 if scaling is None else scaling
        self.softcap: float | None = call.options.get("softcap")
        self.window: int | None = call.options.get("sliding_window")

    def scores(self, start: int, end: int, gain: Tensor | None = None) -> Tensor:
        """Scaled scores of the new rows ``start`` to ``end``, fp32 [B, H, R, K], unmasked.

        ``gain`` [B, H, K] multiplies keys, so what bounds scores comes after it.
        """
        query = self.query[:, :, start:end]
        rows, heads, r, _ = query.shape
        if self.groups > 1:  # queries of one key/value head side by side: keys are not repeated
            query = query.unflatten(1, (-1, self.groups)).flatten(2, 3)
        s = torch.matmul(query, self.key.transpose(-1, -2)).float() * self.scaling
        if self.groups > 1:
            s = s.view(rows, heads, r, -1)
        if gain is not None:
            s = s * gain[:, :, None, self.dropped :]
        if self.softcap is not None:
            s = torch.tanh(s / self.softcap) * self.softcap
        return functional.pad(s, (self.dropped, 0)) if self.dropped else s

    def softmax(self, s: Tensor, start: int, end: int) -> Tensor:
        """Weights of scores under the call's mask; a wholly masked row becomes uniform."""
        mask = self._visible(start, end)
        if mask is None:
            return s.softmax(-1)
        if mask.dtype != torch.bool:
            return (s + mask).softmax(-1)
        return s.masked_fill(~mask, torch.finfo(s.dtype).min).softmax(-1)

    def attend(self, a: Tensor) -> Tensor:
        """Weights [B, H, R, K] times values: [B, R, H, d], in the model's precision."""
        a = a[..., self.dropped :].to(self.value.dtype)
        if self.groups > 1:
            grouped = a.unflatten(1, (-1, self.groups)).flatten(2, 3)
            y = torch.matmul(grouped, self.value).view(*a.shape[:3], -1)
        else:
            y = torch.matmul(a, self.value)
        return y.transpose(1, 2)

    def values(self) -> Tensor:
        """Values of all positions, one set per query head: [B, H, K, d]; 0 where dropped."""
        v = self.value.repeat_interleave(self.groups, dim=1) if self.groups > 1 else self.value
        return functional.pad(v, (0, 0, self.dropped, 0)) if self.dropped else v

    def _visible(self, start: int, end: int) -> Tensor | None:
        """What may be seen: bool or additive, broadcastable to [B, H, R, K]; None: everything."""
        mask = self.mask
        if mask is not None and mask.ndim == 4:
            part = mask[:, :, start:end] if mask.shape[2] > 1 else mask
            if self.dropped:
                closed = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
                part = functional.pad(part, (self.dropped, 0), value=closed)
            return part if part.dtype == torch.bool else part.float()
        if mask is None and self.new == 1 and not self.dropped:
            return None
        device = self.query.device
        rows = torch.arange(self.past + start, self.past + end, device=device)[:, None]
        columns = torch.arange(self.total, device=device)
        seen = columns <= rows
        if self.window is not None:
            seen = seen & (columns > rows - self.window)
        if self.dropped:
            seen = seen & (columns >= self.dropped)
        if mask is None:
            return seen[None, None]
        real = functional.pad(mask.bool(), (self.dropped, 0), value=True)
        return (seen & real[:, None])[:, None]


class RowsOfWhatIsLeft(AttentionRows):
    """The last row of a layer that lacks positions, in sequence positions all the same.

    Columns of positions that have left hold weight 0. For methods that only look: nothing is
    written back.

    Args:
        call: What the kernel was given.
        rows: Number of main rows B.
        past: Positions before the new ones, those that left included.
        kept: int64 [B, n]; positions of the prompt that the layer holds, -1 for columns of nothing.
        length: Positions of the whole prompt.
    """

    def __init__(self, call: Call, rows: int, past: int, kept: Tensor, length: int) -> None:
        super().__init__(call, rows, 0)
        self.total = past + self.new if past else length
        self.past = self.total - self.new  # the last row has the last position
        tail = torch.arange(length, self.total, device=kept.device).expand(rows, -1)
        held = torch.cat([kept, tail], dim=1)
        # A window has dropped the oldest columns.
        self.key, self.value = call.key[:rows], call.value[:rows]
        self.held = held[:, held.shape[1] - self.key.shape[2] :]
        self.mask, self.dropped = None, 0
        mask = call.mask
        if mask is not None and mask.ndim == 4:
            self.mask = mask[:rows, :, -1:, : self.key.shape[2]]

    def softmax(self, s: Tensor, start: int, end: int) -> Tensor:
        """Weights at the positions they belong to, 0 where nothing is left."""
        seen = (self.held >= 0)[:, None, None]
        if self.mask is not None and self.mask.dtype == torch.bool:
            seen = seen & self.mask
        elif self.mask is not None:
            s = s + self.mask.float()
        a = s.masked_fill(~seen, torch.finfo(s.dtype).min).softmax(-1)
        index = torch.where(self.held < 0, self.total, self.held)[:, None, None].expand_as(a)
        return a.new_zeros(*a.shape[:3], self.total + 1).scatter(3, index, a)[..., :-1]
