"""Random tokens in a batch whose rows have temperatures and seeds of their own.

``generate`` draws all rows of a batch from one stream of random numbers, with one temperature; an
answer would depend on who asked at the same time. Here every row has a generator of its own, and
the draw is that of ``generate`` for this row alone: with a seed, `mmlm.streaming.AnswerStream`
gives the same answer.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopPLogitsWarper,
)

from mmlm.runner import seeded
from mmlm.serve.jobs import Choosing

__all__ = ["RowSampler"]


class RowSampler(LogitsProcessor):
    """Draws a token for every row that wants one, and leaves the drawn one alone as possible.

    Under it ``generate`` takes the most probable token of each row.

    Args:
        rows: How the tokens of each row are chosen.
        device: Where the model runs.
    """

    def __init__(self, rows: Sequence[Choosing], device: torch.device) -> None:
        self._rows = [
            (number, _warpers(row), _generator(row.seed, device))
            for number, row in enumerate(rows)
            if row.temperature > 0
        ]

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """The scores, with everything but the drawn token ruled out in the rows that draw."""
        scores = scores.clone()
        for number, warpers, generator in self._rows:
            row = slice(number, number + 1)
            warped = warpers(input_ids[row], scores[row])  # type: ignore[arg-type]
            probabilities = warped.softmax(-1)
            token = torch.multinomial(probabilities, 1, generator=generator)
            scores[row] = torch.full_like(scores[row], -torch.inf).scatter(1, token, 0.0)
        return scores


def _warpers(row: Choosing) -> LogitsProcessorList:
    """In the order in which ``generate`` applies them."""
    found = LogitsProcessorList()
    if row.temperature != 1.0:
        found.append(TemperatureLogitsWarper(row.temperature))
    if row.top_p < 1.0:
        found.append(TopPLogitsWarper(row.top_p))
    return found


def _generator(seed: int, device: torch.device) -> torch.Generator:
    with seeded(seed, ["stream"], device):
        return torch.Generator(device).manual_seed(torch.initial_seed())
