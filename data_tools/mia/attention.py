"""Whose attention: sums over the keys of every image, and the share of each.

Paper: MIA-DPO, arXiv 2410.17637; authors' code: Liuziyu77/MIA-DPO, commit a85c51a. There the ratio
is a quotient of means over the keys of each image, which is one of sums as long as all images have
equally many. Where they have not (tiles, native resolution), only sums are shares of attention.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["image_sums", "key_attention", "shares"]


def key_attention(chunks: Iterable[Tensor], keys: int) -> Tensor:
    """Attention on each key of a prompt, from rows that come in chunks.

    Args:
        chunks: Post-softmax rows [H, R, K] of the response tokens that were fed back, with K at
            least ``keys``; a chunk is dropped before the next one is taken.
        keys: Positions of the prompt; keys behind them are response tokens.

    Returns:
        fp64 [keys]: mean over heads, summed over all rows.

    Raises:
        ValueError: If there is no row: a response of one token has none, and has no ratio.
    """
    from mmlm.probes.image_attention import key_sums

    total: Tensor | None = None
    for chunk in chunks:
        new = key_sums(chunk[None].double(), None, keys)[0]
        total = new if total is None else total + new
    if total is None:
        raise ValueError("there are no attention rows: the response has a single token")
    return total


def image_sums(attention: Tensor, positions: Sequence[Tensor]) -> list[float]:
    """The attention on every image.

    Args:
        attention: [keys], see `key_attention`.
        positions: Per image the keys that are its tokens, read from the token ids and never
            counted from an assumed number of tokens.
    """
    return [float(attention[where].double().sum()) for where in positions]


def shares(sums: Sequence[float], counts: Sequence[int] | None = None) -> list[float] | None:
    """The share of every image in the attention on all of them.

    Args:
        sums: Attention on each image or region.
        counts: Number of keys of each, to compare means instead of sums (the authors' rule, for
            parity).

    Returns:
        Shares in [0, 1] that sum to 1; None if there is no attention on any image, or it is no
        number.
    """
    values = list(sums) if counts is None else [s / n for s, n in zip(sums, counts, strict=True)]
    total = math.fsum(values)
    if not math.isfinite(total) or total <= 0:
        return None
    return [value / total for value in values]
