"""How much attention each key gets from the queries that can see it, and which keys are sinks.

Pure functions of attention rows that come in chunks; a chunk has every key, a layer's rows never
stand side by side. What a query can see is read from its own row: masked keys have a weight of
exactly 0. So windows, images that see themselves and padding need no case of their own.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["Columns", "causal_baseline", "sink_percent", "sink_set"]


@dataclass(eq=False)
class Columns:
    """Sums over the queries of one layer.

    Attributes:
        sums: [B, H, K]; weight on each key.
        queries: [B, K]; how many queries can see it.
        even: [B, K]; what ``sums`` would be if each query looked at all it sees alike.
        rows: [B]; how many queries there were.
    """

    sums: Tensor
    queries: Tensor
    even: Tensor
    rows: Tensor

    @classmethod
    def of(cls, a: Float[Tensor, "B H R K"], counted: Bool[Tensor, "B R"]) -> Columns:
        """The sums of some queries.

        Args:
            a: Their weights.
            counted: Queries that count; padding has rows, too.
        """
        # A key that one head cannot see, none can: a weight that vanished in one is not masked.
        seen = (a.amax(1) > 0) & counted[..., None]
        even = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        sums = (a * counted[:, None, :, None]).sum(2)
        return cls(sums, seen.sum(1).to(a.dtype), even.sum(1), counted.sum(1).to(a.dtype))

    def __add__(self, other: Columns) -> Columns:
        return Columns(
            self.sums + other.sums,
            self.queries + other.queries,
            self.even + other.even,
            self.rows + other.rows,
        )

    @property
    def means(self) -> Float[Tensor, "B H K"]:
        """alpha: mean weight over the queries that can see the key; 0 where there is none."""
        return self.sums / self.queries.clamp(min=1)[:, None]

    @property
    def baseline(self) -> Float[Tensor, "B K"]:
        """The means of attention that is spread evenly."""
        return self.even / self.queries.clamp(min=1)

    @property
    def shares(self) -> Float[Tensor, "B H K"]:
        """The part of all queries' attention that a key gets; sums to 1 over the keys."""
        return self.sums / self.rows.clamp(min=1)[:, None, None]


def causal_baseline(n: int) -> Float[Tensor, " n"]:
    """Column means of attention that is causal and even: what noise gives.

    ``baseline_k = (1 / (n - k)) sum_{i >= k} 1 / (i + 1)``, k from 0. The first of 64 keys gets
    0.074, the first of 12 gets 0.26: an absolute threshold means something for long rows only.
    """
    even = 1 / torch.arange(1, n + 1, dtype=torch.float64)
    return even.flip(0).cumsum(0).flip(0) / torch.arange(n, 0, -1)


def sink_percent(means: Float[Tensor, "*B K"], eps: float) -> Float[Tensor, " K"]:
    """Percent of samples, layers and heads in which a key's mean is above eps (paper)."""
    return (means > eps).double().flatten(0, -2).mean(0) * 100


def sink_set(
    means: Float[Tensor, "*B K"],
    baseline: Float[Tensor, "*#B K"],
    queries: Float[Tensor, "*#B K"],
    *,
    eps: float,
    factor: float,
    min_queries: int,
) -> Bool[Tensor, "*B K"]:
    """Keys above eps, or above ``factor`` times an even share, that enough queries can see."""
    return ((means > eps) | (means > factor * baseline)) & (queries >= min_queries)
