"""TRL's columns as a table: parquet, or a folder that ``datasets.load_from_disk`` opens."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

__all__ = ["write_folder", "write_parquet"]

_GROUP = 100  # rows in memory at once, with their pictures


def write_parquet(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes rows with their pictures' bytes; `datasets` reads the column as pictures.

    Args:
        rows: Rows of ``trl`` or ``trl-text``.
        path: The file.

    Returns:
        How many rows there were.
    """
    import pyarrow
    import pyarrow.parquet

    source = iter(rows)
    first = list(itertools.islice(source, _GROUP))
    raw = bool(first) and isinstance(first[0]["prompt"], str)
    schema = _features(raw).arrow_schema
    count = 0
    with pyarrow.parquet.ParquetWriter(path, schema) as writer:
        while first:
            table = pyarrow.Table.from_pylist([_with_bytes(row) for row in first], schema=schema)
            writer.write_table(table)
            count += len(first)
            first = list(itertools.islice(source, _GROUP))
    return count


def write_folder(rows: Iterable[Mapping[str, Any]], path: Path) -> int:
    """Writes rows as ``Dataset.save_to_disk`` does.

    Args:
        rows: Rows of ``trl`` or ``trl-text``.
        path: The folder; must not exist. Beside it there must be room for two copies.

    Returns:
        How many rows there were.
    """
    import tempfile

    import datasets

    # Its own cache would keep every data set that was ever converted.
    with tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent) as work:
        table = Path(work) / "table.parquet"
        count = write_parquet(rows, table)
        bars = datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            made = datasets.Dataset.from_parquet(str(table), cache_dir=work)
            made.save_to_disk(str(path))
        finally:
            if not bars:
                datasets.enable_progress_bars()
    return count


def _features(raw: bool) -> Any:
    from datasets import Features, Image, List, Value

    text = Value("string")
    blocks = List({"type": text, "text": text})
    answer = List({"role": text, "content": text})
    return Features(
        {
            "id": text,
            "images": List(Image()),
            "prompt": text if raw else List({"role": text, "content": blocks}),
            "chosen": text if raw else answer,
            "rejected": text if raw else answer,
        }
    )


def _with_bytes(row: Mapping[str, Any]) -> dict[str, Any]:
    files = [Path(path) for path in row["images"]]
    return {**row, "images": [{"bytes": file.read_bytes(), "path": file.name} for file in files]}
