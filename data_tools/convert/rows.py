"""From files to rows, whatever the format: JSON, JSON lines, parquet, folders of these."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.convert.preference import Problem
from data_tools.done import DONE, read_kind
from mmlm.errors import InputError

__all__ = ["Row", "rows_of"]

_BATCH = 64  # rows of a parquet file that are in memory at once, with their pictures


@dataclass(frozen=True)
class Row:
    """One row of a file.

    Attributes:
        place: Where it stands, for messages.
        values: Its fields.
    """

    place: str
    values: Mapping[str, Any]


def rows_of(path: Path) -> Iterator[Row | Problem]:
    """Reads a file or a folder, one row after the other.

    Args:
        path: JSON lines (``.jsonl``); JSON (``.json``: a list of objects, lists of objects by the
            identifier of their picture, or JSON lines after all); parquet; a folder of parquet
            files; a folder that ``datasets`` saved; or the output of one of our pipelines.

    Yields:
        Rows, and what could not be read as one.

    Raises:
        InputError: If there is no such file or it is none of these.
    """
    if path.is_dir():
        yield from _folder(path)
        return
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.", advice="Check the path.")
    readers = {
        ".jsonl": _lines,
        ".ndjson": _lines,
        ".json": _json,
        ".parquet": _parquet,
    }
    if path.suffix.lower() not in readers:
        raise InputError(
            f"{str(path)!r} ends in none of {', '.join(readers)}.",
            advice="Rename it after what it holds.",
        )
    yield from readers[path.suffix.lower()](path)


def _folder(path: Path) -> Iterator[Row | Problem]:
    if any(path.glob(f"{DONE}*.jsonl")):
        for identifier, lines in read_kind(path, "pairs"):
            for line in lines:
                yield Row(f"{path / 'pairs.jsonl'}, record {identifier}", line)
    elif (path / "dataset_info.json").is_file() and (path / "state.json").is_file():
        yield from _saved(path)
    elif files := sorted(path.rglob("*.parquet")):
        for file in files:
            yield from _parquet(file)
    else:
        raise InputError(
            f"{str(path)!r} is neither a pipeline's output, nor saved by datasets, nor does it "
            "hold parquet files.",
            advice="Give one file.",
        )


def _lines(path: Path) -> Iterator[Row | Problem]:
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            place = f"{path}, line {number}"
            try:
                # A byte order mark opens files from some editors.
                value = json.loads(line.decode("utf-8-sig"))
            except UnicodeDecodeError as error:
                yield Problem(place, f"no UTF-8 text ({error.reason} at byte {error.start})")
            except ValueError as error:
                yield Problem(place, f"no JSON ({error})")
            else:
                yield _row(place, value)


def _json(path: Path) -> Iterator[Row | Problem]:
    try:
        value = json.loads(path.read_bytes().decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is no UTF-8 text ({error}).", advice="Save it as UTF-8."
        ) from error
    except json.JSONDecodeError as error:
        if error.msg != "Extra data":
            raise InputError(
                f"{str(path)!r} is no JSON: {error}.", advice="Was it downloaded completely?"
            ) from error
        yield from _lines(path)
        return
    if isinstance(value, dict) and value and all(isinstance(own, list) for own in value.values()):
        for key, own in value.items():
            for number, entry in enumerate(own, start=1):
                row = _row(f"{path}, {key}, entry {number}", entry)
                yield (
                    Row(row.place, {"image_id": key, **row.values}) if isinstance(row, Row) else row
                )
    elif isinstance(value, list):
        for number, entry in enumerate(value, start=1):
            yield _row(f"{path}, entry {number}", entry)
    else:
        raise InputError(
            f"{str(path)!r} is neither a list of objects nor lists of objects by picture.",
            advice="Give a file in one of the formats that `mmlm data convert --help` names.",
        )


def _row(place: str, value: Any) -> Row | Problem:
    if not isinstance(value, dict):
        return Problem(place, f"a {type(value).__name__}, no object")
    return Row(place, value)


def _parquet(path: Path) -> Iterator[Row | Problem]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=_BATCH):
                for values in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}, row {number}", values)
    except pyarrow.ArrowException as error:
        raise InputError(
            f"{str(path)!r} cannot be read behind row {number}: {error}.",
            advice="Was it downloaded completely?",
        ) from error


def _saved(path: Path) -> Iterator[Row | Problem]:
    import datasets

    table = datasets.load_from_disk(str(path))
    if not isinstance(table, datasets.Dataset):
        raise InputError(
            f"{str(path)!r} holds several splits: {', '.join(table)}.",
            advice="Give the folder of one of them.",
        )
    for number, values in enumerate(table.with_format("arrow").iter(batch_size=1), start=1):
        yield Row(f"{path}, row {number}", values.to_pylist()[0])
