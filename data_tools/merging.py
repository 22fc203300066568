"""Puts the shards of a stage together: one file per kind, records sorted by identifier.

Lines are copied byte by byte, and only where they begin is kept in memory: less than a gigabyte for
a million records, whatever their lines hold.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from data_tools.done import DONE, RUN, being_written, finished, too_short
from mmlm.errors import InputError
from mmlm.records import INFORMATION
from mmlm.sharding import Shard

__all__ = ["merge_shards"]


@dataclass(frozen=True, slots=True)
class _Span:
    """Where the lines of one record stand."""

    shard: int
    start: int
    size: int


def merge_shards(folder: Path) -> dict[str, int]:
    """Puts the shards of a stage together; merging again gives the same files.

    Args:
        folder: A stage's output in shards.

    Returns:
        Lines per kind, ``done`` included.

    Raises:
        InputError: If there are no shards, or some are missing, not finished, at work or damaged;
            says which. Nothing is written then.
    """
    shards = _shards_of(folder)
    records = {shard.index: _records_of(folder, shard) for shard in shards}
    _check_finished(folder, records)
    counts = {}
    # `done` last: only now does the folder count as one finished run.
    for kind in [*_kinds_of(folder, shards[0]), DONE]:
        spans: dict[str, _Span] = {}
        for shard in shards:
            spans |= _spans(folder, kind, shard, records[shard.index])
        counts[kind] = _write(folder, kind, shards, [spans[key] for key in sorted(spans)])
    return counts


def _shards_of(folder: Path) -> list[Shard]:
    found = {
        Shard(int(match[1]), int(match[2]))
        for path in folder.glob(f"{DONE}.shard-*.jsonl")
        if (match := re.fullmatch(rf"{DONE}\.shard-(\d+)-of-(\d+)\.jsonl", path.name))
    }
    counts = {shard.count for shard in found}
    if len(counts) != 1:
        what = "no shards" if not counts else f"shards of several divisions ({sorted(counts)})"
        raise InputError(
            f"{str(folder)!r} holds {what}.",
            advice="Give the folder that the shards of one run wrote to.",
        )
    count = counts.pop()
    if missing := [f"{i}/{count}" for i in range(count) if Shard(i, count) not in found]:
        raise InputError(
            f"{str(folder)!r} lacks the shards {', '.join(missing)}.",
            advice="Run them, or copy their files here.",
        )
    return sorted(found, key=lambda shard: shard.index)


def _kinds_of(folder: Path, shard: Shard) -> list[str]:
    """The kinds of lines beside ``done``: every shard has a file of each, be it empty."""
    ending = shard.path(Path("x.jsonl")).name.removeprefix("x")
    names = (path.name.removesuffix(ending) for path in folder.glob(f"*{ending}"))
    return sorted(name for name in names if name != DONE)


def _records_of(folder: Path, shard: Shard) -> list[dict[str, Any]]:
    """What a shard has finished, as far as its own records go."""
    path = shard.path(folder / f"{DONE}.jsonl")
    if being_written(path):
        raise InputError(
            f"The shard {shard} in {str(folder)!r} is still at work.",
            advice="Merge when all shards are finished.",
        )
    records = [{"id": line["id"], "lines": line["lines"]} for line in finished(path)]
    for record in records:
        if not shard.owns(record["id"]):
            raise InputError(
                f"{str(path)!r} holds the record {record['id']!r}, which belongs to another shard.",
                advice="Restore the file; records belong to shards by their identifiers.",
            )
    return records


def _check_finished(folder: Path, records: dict[int, list[dict[str, Any]]]) -> None:
    done = sum(map(len, records.values()))
    path = folder / RUN
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"The run record {str(path)!r} cannot be read.",
            advice="It belongs to the shards: copy it here as well.",
        ) from error
    total = run.get(INFORMATION, {}).get("records", done)
    if done < total:
        parts = [f"{index}/{len(records)} has {len(own)}" for index, own in records.items()]
        raise InputError(
            f"{done} of {total} records in {str(folder)!r} are done: {', '.join(parts)}.",
            advice="Finish all shards (the same commands go on where they stopped), then merge.",
        )


def _spans(
    folder: Path, kind: str, shard: Shard, records: Iterable[dict[str, Any]]
) -> Iterator[tuple[str, _Span]]:
    path = shard.path(folder / f"{kind}.jsonl")
    start = 0
    with path.open("rb") as stream:
        for record in records:
            size = 0
            for _ in range(1 if kind == DONE else record["lines"].get(kind, 0)):
                line = stream.readline()
                if not line.endswith(b"\n"):
                    raise too_short(path)
                size += len(line)
            yield record["id"], _Span(shard.index, start, size)
            start += size


def _write(folder: Path, kind: str, shards: Iterable[Shard], spans: Iterable[_Span]) -> int:
    """Writes a merged file so that at any moment the old or the new one is there, whole."""
    path = folder / f"{kind}.jsonl"
    temporary = folder / f".{path.name}.{os.getpid()}.tmp"
    count = 0
    with ExitStack() as stack:
        sources: dict[int, BinaryIO] = {
            shard.index: stack.enter_context(shard.path(path).open("rb")) for shard in shards
        }
        stack.callback(temporary.unlink, missing_ok=True)
        with temporary.open("wb") as stream:
            for span in spans:
                source = sources[span.shard]
                source.seek(span.start)
                lines = source.read(span.size)
                stream.write(lines)
                count += lines.count(b"\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    return count
