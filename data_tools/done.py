"""The ``done`` file of a stage's output, and which lines of the other files belong to which record.

A record's lines are written before its line in ``done.jsonl``, and in the same order, so that
counting is enough to tell them apart; see `data_tools.records`.
"""

from __future__ import annotations

import fcntl
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from mmlm.errors import InputError
from mmlm.sharding import Shard

__all__ = [
    "DONE",
    "RUN",
    "WHOLE",
    "being_written",
    "cut",
    "damaged",
    "finished",
    "read_kind",
    "too_short",
]

DONE = "done"
RUN = "run.json"
WHOLE = Shard()


def read_kind(
    folder: Path, kind: str, shard: Shard = WHOLE
) -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """Reads the lines of a kind, record by record; lines whose record is not done are left out.

    Args:
        folder: A stage's output.
        kind: Name of the kind.
        shard: Which part.

    Yields:
        The record's identifier and its lines of this kind, in the order in which records were
        finished.

    Raises:
        InputError: If there is no such output, or it is damaged.
    """
    done = shard.path(folder / f"{DONE}.jsonl")
    if not done.is_file():
        raise InputError(
            f"{str(folder)!r} holds no finished records ({done.name} is missing).",
            advice="Run the stage first; put shards together with `mmlm data merge`.",
        )
    path = shard.path(folder / f"{kind}.jsonl")
    if not path.is_file():
        raise InputError(
            f"{str(folder)!r} holds no lines of the kind {kind!r} ({path.name} is missing).",
            advice="See which files the stage writes.",
        )
    lines = (_object(path, number, line) for number, line in _complete(path))
    for record in finished(done):
        count = record["lines"].get(kind, 0)
        own = list(itertools.islice(lines, count))
        if len(own) < count:
            raise too_short(path)
        yield record["id"], own


def finished(path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a ``done`` file; a half one at its end was cut off by a kill.

    Args:
        path: The file; need not exist.

    Yields:
        ``{"id", "status", "seconds", "lines"}``, every record once.

    Raises:
        InputError: If a line is damaged other than by a kill, or a record is there twice.
    """
    seen: set[str] = set()
    for number, line in _complete(path):
        record = _object(path, number, line)
        if not (isinstance(record.get("lines"), dict) and isinstance(record.get("id"), str)):
            raise damaged(path, f"line {number} does not say which record is done")
        if record["id"] in seen:
            raise damaged(path, f"line {number} says a second time that {record['id']!r} is done")
        seen.add(record["id"])
        yield record


def being_written(path: Path) -> bool:
    """Whether a process has a ``done`` file open for writing."""
    with path.open("rb") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def cut(stream: BinaryIO, wanted: int) -> int:
    """Keeps the first lines of a file; returns how many there were to keep."""
    stream.seek(0)
    end = kept = 0
    for line in itertools.islice(stream, wanted):
        if line.endswith(b"\n"):
            end += len(line)
            kept += 1
    stream.seek(end)
    stream.truncate()
    return kept


def _complete(path: Path) -> Iterator[tuple[int, bytes]]:
    """The complete lines of a file with their numbers; nothing if there is no file."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for number, line in enumerate(stream, start=1):
            if line.endswith(b"\n"):
                yield number, line


def _object(path: Path, number: int, line: bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:  # no JSON, or bytes that are no UTF-8
        raise damaged(path, f"line {number} is no JSON") from error
    if not isinstance(value, dict):
        raise damaged(path, f"line {number} is no JSON object")
    return value


def damaged(path: Path, how: str) -> InputError:
    """The error for a file of the output that is not as it was written."""
    return InputError(
        f"{str(path)!r} is damaged: {how}.",
        advice="Restore the file, choose another --output, or start again with --overwrite.",
    )


def too_short(path: Path) -> InputError:
    """The error for a file that lost lines."""
    return damaged(path, f"it has fewer lines than {DONE} counts, so it was changed")
