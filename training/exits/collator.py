"""Batches for the training of routers: those of supervised fine-tuning, with the rows' names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.sft.collator import SFTCollator

if TYPE_CHECKING:
    from training.sft.data import Example

__all__ = ["ExitCollator"]


class ExitCollator(SFTCollator):
    """As `SFTCollator`, and ``ids``: the names of the rows, under which labels are kept."""

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch of examples, one conversation each."""
        batch = super().__call__(examples)
        return {**batch, "ids": [example.rows[0].id for example in examples]}
