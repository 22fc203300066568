"""Reads preference records: tells the format, converts row by row, reports what it leaves out."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path

from data_tools.convert import READERS
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import PreferenceRecord, Problem, RecordError, check
from data_tools.convert.rows import Row, rows_of
from mmlm.errors import InputError

__all__ = ["AUTO", "detect", "read"]

AUTO = "auto"
_LOOKED_AT = 20  # rows that must agree about the format


def read(
    path: Path, source_format: str, pictures: Pictures
) -> Iterator[PreferenceRecord | Problem]:
    """Reads a file of preferences.

    Args:
        path: See `data_tools.convert.rows.rows_of`.
        source_format: Name of the format, or ``auto``.
        pictures: Finds the pictures.

    Yields:
        Records that can be learned from, each identifier once, and for all other rows what is
        wrong with them.

    Raises:
        InputError: If the file cannot be read, or the format is unknown or cannot be told.
    """
    rows = rows_of(path)
    if source_format == AUTO:
        first = list(itertools.islice(rows, _LOOKED_AT))
        source_format = detect(first, path)
        rows = itertools.chain(first, rows)
    if source_format not in READERS:
        raise InputError(
            f"There is no format {source_format!r} to read.",
            advice=f"Formats: {', '.join(READERS)}, or {AUTO}.",
        )
    reader = READERS[source_format]
    seen: dict[str, str] = {}
    for place, row in enumerate(rows, start=1):
        if isinstance(row, Problem):
            yield row
            continue
        try:
            record = reader.record(row.values, place, pictures)
            check(record)
        except RecordError as error:
            yield Problem(row.place, str(error))
            continue
        if record.id in seen:
            yield Problem(row.place, f"the id {record.id!r} was there before: {seen[record.id]}")
            continue
        seen[record.id] = row.place
        yield record


def detect(rows: list[Row | Problem], path: Path) -> str:
    """Tells the format of rows by their fields.

    Args:
        rows: The first rows of a file.
        path: The file, for messages.

    Raises:
        InputError: If no format, or more than one, fits all of them; says what was seen.
    """
    whole = [row for row in rows if isinstance(row, Row)]
    names = [
        name
        for name, reader in READERS.items()
        if whole and all(reader.recognises(row.values) for row in whole)
    ]
    if len(names) == 1:
        return names[0]
    if not whole:
        seen = f"no row of {str(path)!r} could be read" if rows else f"{str(path)!r} is empty"
    else:
        fields = ", ".join(f"{name} ({type(v).__name__})" for name, v in whole[0].values.items())
        several = f" fit {' and '.join(names)}" if names else " are of no known format"
        seen = f"the fields of {whole[0].place}{several}: {fields}"
    raise InputError(
        f"The format cannot be told: {seen}.", advice=f"Say it: --from {', '.join(READERS)}."
    )
