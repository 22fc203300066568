"""Rows in memory as the table that TRL's trainer asks for."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError
from training.preference.rows import PreferenceRow

if TYPE_CHECKING:
    from datasets import Dataset

__all__ = ["row_table"]


def row_table(rows: Sequence[PreferenceRow], lengths: Sequence[int] | None = None) -> Dataset:
    """A `datasets.Dataset` whose items are the fields of the rows, as they are in memory.

    Only numbers and paths are stored in the table: as Arrow columns, messages would come back with
    fields that they never had.

    Args:
        rows: at least one.
        lengths: tokens of each row; then the table has the column `length`, by which the Trainer
            groups rows.

    Raises:
        InputError: there is no row.
    """
    from datasets import Dataset

    if not rows:
        raise InputError("There is no row to train on.", advice="Check the files under `data`.")
    names = [field.name for field in fields(PreferenceRow)]

    def whole(batch: dict[str, list[Any]]) -> dict[str, list[Any]]:
        if "row" not in batch:  # a single column was asked for
            return batch
        items = {name: [getattr(rows[i], name) for i in batch["row"]] for name in names}
        # The Trainer reads the column item by item, and an item is what this function returns.
        return items | ({"length": batch["length"]} if "length" in batch else {})

    columns: dict[str, Any] = {"row": list(range(len(rows)))}
    if lengths is not None:
        columns["length"] = list(lengths)
    return Dataset.from_dict(columns).with_transform(whole)
