"""Perplexity of a response, from the probabilities of its tokens.

MIA-DPO (arXiv 2410.17637; code Liuziyu77/MIA-DPO, commit a85c51a) takes the largest probability of
every step, which is that of the token that was written only because decoding is greedy. Ours takes
the token that was written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["log_probabilities", "perplexity"]

_ROWS = 16
"""Rows of logits that are held in double precision at once."""


def log_probabilities(logits: Tensor, tokens: Tensor | None = None) -> Tensor:
    """Log-probabilities of the tokens that were written, or of the most probable ones (parity).

    Args:
        logits: [T, V]; row t is what token t was drawn from.
        tokens: int64 [T]; None: the most probable token of each row.

    Returns:
        fp64 [T].
    """
    import torch

    chosen = logits.amax(-1) if tokens is None else logits.gather(-1, tokens[:, None])[:, 0]
    # A vocabulary in double precision is large: some rows at a time.
    sums = [part.double().logsumexp(-1) for part in torch.split(logits, _ROWS)]
    return chosen.double() - torch.cat(sums)


def perplexity(log_probs: Sequence[float] | Tensor) -> float | None:
    """``exp(-mean log p)``, >= 1; the end token counts.

    Returns:
        None if there is no token, or the mean is no number.
    """
    values = [float(x) for x in log_probs]
    if not values:
        return None
    mean = math.fsum(values) / len(values)
    return math.exp(-mean) if math.isfinite(mean) and mean > -700 else None
