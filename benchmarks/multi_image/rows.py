"""Rows of a data set on this disk: parquet, a saved `datasets` folder, JSON or JSON lines.

Nothing is downloaded and nothing is decoded: pictures stay the bytes of their files until the model
needs them, and `Pictures` keeps each of them once, under a name made of its content, so that a run
can be resumed, shared between shards, and looked at.
"""

from __future__ import annotations

import hashlib
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_records
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

__all__ = ["Pictures", "Row", "find_files", "read_rows"]

_SUFFIXES = (".parquet", ".jsonl", ".json", ".jsonl.gz", ".json.gz")
_SPLIT_NAMES = re.compile(r"(train|dev|val|validation|test|test1|test2)(?=[-.])")
_MAGIC = {b"\x89PNG": ".png", b"\xff\xd8": ".jpg", b"RIFF": ".webp", b"GIF8": ".gif", b"BM": ".bmp"}


@dataclass(frozen=True)
class Row:
    """One record and where it stands.

    Attributes:
        values: The columns.
        file: The file, or folder, it comes from.
        number: Its number there, from 1.
    """

    values: Mapping[str, Any] = field(repr=False)
    file: Path
    number: int

    @property
    def place(self) -> str:
        """File and number, for messages."""
        return f"{self.file}, row {self.number}"

    def text(self, name: str) -> str:
        """A text column.

        Raises:
            InputError: If it is missing, or holds something else.
        """
        value = self.values.get(name)
        if not isinstance(value, str):
            raise self.refused(f"column {name!r} holds {_short(value)} instead of a text")
        return value

    def texts(self, name: str) -> tuple[str, ...]:
        """A column that holds a list of texts.

        Raises:
            InputError: If it is missing, or holds something else.
        """
        value = self.values.get(name)
        if not isinstance(value, list | tuple) or not all(isinstance(one, str) for one in value):
            raise self.refused(f"column {name!r} holds {_short(value)} instead of a list of texts")
        return tuple(value)

    def refused(self, reason: str) -> InputError:
        """The error for a row that cannot be used."""
        columns = ", ".join(self.values)
        return InputError(f"{self.place}: {reason}.", advice=f"The row's columns are: {columns}.")


def read_rows(path: Path, split: str) -> Iterator[Row]:
    """Reads the rows of one split, in the order of the file names.

    Args:
        path: A parquet, JSON or JSON lines file, a folder with such files at any depth, or a
            folder written by ``save_to_disk``.
        split: Which split, where the files' names begin with one, as on the Hugging Face hub:
            ``Art/validation-00000-of-00001.parquet``.

    Raises:
        InputError: If there is nothing to read, the split is not there, or a file is damaged.
    """
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        yield from _saved(path, split)
        return
    for file in find_files(path, split):
        records = _parquet(file) if file.suffix == ".parquet" else iter(read_records(file))
        for number, record in enumerate(records, start=1):
            yield Row(record, file, number)


def find_files(path: Path, split: str) -> list[Path]:
    """The data files of one split.

    Raises:
        InputError: If there are none.
    """
    every = [path] if path.is_file() else sorted(path.rglob("*"))
    files = [file for file in every if file.suffix == ".parquet"]
    files = files or [file for file in every if file.name.endswith(_SUFFIXES)]
    if not files:
        raise InputError(
            f"There is no data in {str(path)!r}.",
            advice=f"Give a file, or a folder with files that end in {', '.join(_SUFFIXES)}.",
        )
    named = {file: match[1] for file in files if (match := _SPLIT_NAMES.match(file.name))}
    if not named:
        return files
    if chosen := [file for file in files if named.get(file) == split]:
        return chosen
    there = ", ".join(sorted(set(named.values())))
    raise InputError(
        f"{str(path)!r} has no split {split!r}; there are: {there}.",
        advice="Choose another --split, or give the files of this one.",
    )


def _parquet(file: Path) -> Iterator[dict[str, Any]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            for batch in parquet.iter_batches(batch_size=16):
                yield from batch.to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"{file} cannot be read: {error}.", advice="Download the file again."
        ) from error


def _saved(path: Path, split: str) -> Iterator[Row]:
    from datasets import DatasetDict, load_from_disk

    data = load_from_disk(str(path))
    if isinstance(data, DatasetDict):
        if split not in data:
            raise InputError(
                f"{str(path)!r} has no split {split!r}; there are: {', '.join(data)}.",
                advice="Choose another --split.",
            )
        data = data[split]
    number = 0
    # As Arrow tables pictures stay files; otherwise they would be decoded here.
    for table in data.with_format("arrow").iter(batch_size=16):
        for record in table.to_pylist():
            number += 1
            yield Row(record, path, number)


@dataclass
class Pictures:
    """Where pictures are: those inside a data set are written out, those beside it are found.

    Args:
        kept: Folder for pictures that come as bytes; made when the first one comes.
        beside: Folder to which names of files refer; by default that of the data file.

    Attributes:
        missing: Files that were named but are not there.
    """

    kept: Path
    beside: Path | None = None
    missing: list[Path] = field(default_factory=list)

    def of(self, row: Row, *columns: str) -> tuple[Path, ...]:
        """The pictures in the given columns, in order; a column may hold a list; None is skipped.

        Raises:
            InputError: If a column holds something that is no picture.
        """
        found: list[Path] = []
        for column in columns:
            value = row.values.get(column)
            values = value if isinstance(value, list | tuple) else [value]
            found += [self._one(row, column, one) for one in values if one is not None]
        return tuple(found)

    def _one(self, row: Row, column: str, value: Any) -> Path:
        if isinstance(value, dict):  # a picture as `datasets` stores it
            value = value.get("bytes") or value.get("path")
        if isinstance(value, bytes) and value:
            return self.keep(value)
        if not isinstance(value, str) or not value:
            raise row.refused(f"column {column!r} holds {_short(value)} instead of a picture")
        return self.find((self.beside or row.file.parent) / value)

    def find(self, path: Path) -> Path:
        """A picture that has to be there already; notes if it is not."""
        if not path.is_file():
            self.missing.append(path)
        return path

    def keep(self, data: bytes) -> Path:
        """Writes a picture out, once, under a name made of its content."""
        ending = next((end for start, end in _MAGIC.items() if data.startswith(start)), ".img")
        return self.write(hashlib.sha256(data).hexdigest()[:24] + ending, data)

    def write(self, name: str, data: bytes) -> Path:
        """Writes a picture unless it is there; other processes never see half of it."""
        path = self.kept / name
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(data)
            temporary.replace(path)
        return path

    def check(self) -> None:
        """Refuses a data set with missing pictures.

        Raises:
            InputError: Says how many are missing, and names one.
        """
        if self.missing:
            raise InputError(
                f"{len(set(self.missing))} pictures are missing, e.g. {str(self.missing[0])!r}.",
                advice="Give the folder they are in (--images); unpack archives before.",
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
