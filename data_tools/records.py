"""What a stage leaves on the disk: lines of several kinds per record, and which records are done.

A stage turns one record (a picture, an instruction) into any number of lines of one or several
kinds: pairs for training, a line for the audit. All lines of a record are written and synced
first, then its line in ``done.jsonl``. A killed run therefore leaves at most lines whose record is
not done, and the next start drops exactly those: nothing is lost and nothing is there twice.

    out/run.json          everything that determines the lines
    out/pairs.jsonl       one file per kind; of a shard: pairs.shard-1-of-4.jsonl
    out/done.jsonl        {"id", "status", "seconds", "lines"}, the last word on a record

Records come in the order in which they were finished; ``lines`` counts what belongs to each.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mmlm.errors import InputError
from mmlm.records import (
    INFORMATION,
    append_lines,
    differences,
    locked,
    plain_json,
    write_json,
)
from mmlm.sharding import Shard

__all__ = ["DONE", "RUN", "Outcome", "StageOutput", "merge_shards", "read_kind"]

DONE = "done"
RUN = "run.json"
WHOLE = Shard()


@dataclass(frozen=True)
class Outcome:
    """What became of one record.

    Attributes:
        id: The record's identifier.
        status: "ok", or why it has no result.
        lines: Lines by kind.
        seconds: How long it took. Kept apart from the lines, which are the same in every run.
    """

    id: str
    status: str
    lines: Mapping[str, Sequence[Mapping[str, Any]]] = field(default_factory=dict)
    seconds: float = 0.0


class StageOutput:
    """The folder that one stage, or one shard of it, writes.

    Creating the object only reads and checks; nothing is written before the ``with`` block::

        output = StageOutput(folder, run, ("pairs", "images"))
        ... load the models ...
        output.add_facts({"weights": ...})
        with output:
            output.write([Outcome("17", "ok", {"pairs": [...]})])

    Args:
        folder: The folder; need not exist.
        run: What determines the lines (JSON values); its key ``information`` is stored and not
            compared. The shard does not belong in it: all shards share the folder.
        kinds: Names of the files beside ``done``.
        shard: Which part of the records this process works on.
        total: Number of records of the whole stage, all shards together; `merge_shards` needs it.
        overwrite: Throw away what another run left.
        resume_anyway: Go on in the folder of another run, under its run record.

    Attributes:
        done: Status of every finished record by its identifier.

    Raises:
        InputError: If the folder belongs to another run, or its files are damaged other than by a
            kill.
    """

    def __init__(
        self,
        folder: Path,
        run: Mapping[str, Any],
        kinds: Sequence[str],
        shard: Shard = WHOLE,
        *,
        total: int | None = None,
        overwrite: bool = False,
        resume_anyway: bool = False,
    ) -> None:
        self.folder = folder
        self.kinds = tuple(kinds)
        self.shard = shard
        self.done: dict[str, str] = {}
        self._run = plain_json(run)
        if total is not None:
            self._run.setdefault(INFORMATION, {})["records"] = total
        self._overwrite = overwrite
        self._resume_anyway = resume_anyway
        self._streams: dict[str, BinaryIO] = {}
        if folder.exists() and not folder.is_dir():
            raise InputError(
                f"The output {str(folder)!r} is no folder.", advice="Choose another --output."
            )
        self._check(complete=False)

    def path(self, kind: str) -> Path:
        """The file of a kind, of this shard."""
        return self.shard.path(self.folder / f"{kind}.jsonl")

    def lines(self, kind: str) -> list[dict[str, Any]]:
        """All lines of a kind whose records are done, in the order of the file."""
        return [line for _, lines in read_kind(self.folder, kind, self.shard) for line in lines]

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Adds to the run what is known only after loading, e.g. a hash of the weights.

        Raises:
            InputError: If the folder turns out to belong to another run.
        """
        self._run |= plain_json(facts)
        self._check(complete=False)

    def _check(self, *, complete: bool) -> None:
        """Refuses the folder of another run; notes what is done.

        Args:
            complete: Whether all facts of the run are known by now.
        """
        self.done = {}
        if self._overwrite:
            return
        stored = self._stored_run()
        if stored is None:
            return
        different = [
            f"{name} was {old}, now {new}"
            for name, old, new in differences(stored, self._run)
            if complete or name.partition(".")[0] in self._run
        ]
        if different and not self._resume_anyway:
            raise InputError(
                f"The output {str(self.folder)!r} belongs to another run: {'; '.join(different)}.",
                advice="Choose another --output; or --overwrite throws the old run away, and "
                "--resume_anyway goes on with it (its lines then come from two settings).",
            )
        self.done = {line["id"]: line["status"] for line in _whole(self.path(DONE))}

    def _stored_run(self) -> dict[str, Any] | None:
        path = self.folder / RUN
        if not path.exists():
            if self.folder.is_dir() and any(self.folder.glob(f"{DONE}*.jsonl")):
                raise InputError(
                    f"The output {str(self.folder)!r} has no {RUN}: it was not written by this "
                    "command, or the file was removed.",
                    advice="Choose another --output.",
                )
            return None
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(
                f"The run record {str(path)!r} is damaged.", advice="Choose another --output."
            ) from error

    def __enter__(self) -> StageOutput:
        """Opens the files for this process alone, and drops lines whose record is not done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with locked(self.folder / RUN):
            if self._overwrite:
                self._remove()
                self._overwrite = False
            self._check(complete=True)
            if self._stored_run() is None:
                write_json(self.folder / RUN, self._run)
        with contextlib.ExitStack() as stack:
            self._streams = {
                kind: stack.enter_context(self.path(kind).open("ab+"))
                for kind in (DONE, *self.kinds)
            }
            try:
                fcntl.flock(self._streams[DONE], fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"Another process is writing to {str(self.path(DONE))!r}.",
                    advice="Wait for it, or choose another --output or another --shard.",
                ) from None
            self._drop_unfinished()
            self._closing = stack.pop_all()
        return self

    def _remove(self) -> None:
        """Removes what a stage wrote, of all shards, and nothing else."""
        (self.folder / RUN).unlink(missing_ok=True)
        for kind in (DONE, *self.kinds):
            for path in [self.folder / f"{kind}.jsonl", *self.folder.glob(f"{kind}.shard-*.jsonl")]:
                path.unlink(missing_ok=True)

    def _drop_unfinished(self) -> None:
        finished = list(_whole(self.path(DONE)))
        self.done = {line["id"]: line["status"] for line in finished}
        _cut(self._streams[DONE], len(finished))
        for kind in self.kinds:
            wanted = sum(line["lines"].get(kind, 0) for line in finished)
            if _cut(self._streams[kind], wanted) < wanted:
                raise InputError(
                    f"{str(self.path(kind))!r} has fewer lines than {DONE} counts; it was changed "
                    "since it was written.",
                    advice="Restore the file, or start again with --overwrite.",
                )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the files, which also releases the lock."""
        self._closing.close()
        self._streams = {}

    def write(self, outcomes: Sequence[Outcome]) -> None:
        """Puts finished records on the disk: their lines first, then that they are done.

        Raises:
            ValueError: Outside the ``with`` block, for an unknown kind, or a record that is done.
            OSError: If the disk is full; what was written before stays valid.
        """
        if not self._streams:
            raise ValueError("write() works inside `with output:` only")
        for outcome in outcomes:
            if outcome.id in self.done:
                raise ValueError(f"record {outcome.id!r} is done already")
            if unknown := outcome.lines.keys() - set(self.kinds):
                raise ValueError(f"this stage has no lines of kind {sorted(unknown)[0]!r}")
            self.done[outcome.id] = outcome.status
        for kind in self.kinds:
            if new := [line for one in outcomes for line in one.lines.get(kind, ())]:
                append_lines(self._streams[kind], new)
        append_lines(self._streams[DONE], [_done_line(outcome) for outcome in outcomes])


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
    lines = _whole(shard.path(folder / f"{kind}.jsonl"))
    for record in _whole(done):
        count = record["lines"].get(kind, 0)
        own = list(itertools.islice(lines, count))
        if len(own) < count:
            raise InputError(
                f"{kind}.jsonl in {str(folder)!r} has fewer lines than {DONE} counts.",
                advice="Restore the file, or run the stage again with --overwrite.",
            )
        yield record["id"], own


def merge_shards(folder: Path) -> dict[str, int]:
    """Puts the shards of a stage together: one file per kind, records sorted by identifier.

    Args:
        folder: A stage's output in shards.

    Returns:
        Lines per kind, ``done`` included.

    Raises:
        InputError: If there are no shards, or some are missing or not finished; says which.
    """
    shards = _shards_of(folder)
    run = json.loads((folder / RUN).read_text(encoding="utf-8"))
    done = {
        line["id"]: line
        for shard in shards
        for line in _whole(shard.path(folder / f"{DONE}.jsonl"))
    }
    total = run.get(INFORMATION, {}).get("records", len(done))
    if len(done) < total:
        parts = [
            f"{shard} has {sum(1 for _ in _whole(shard.path(folder / f'{DONE}.jsonl')))}"
            for shard in shards
        ]
        raise InputError(
            f"{len(done)} of {total} records in {str(folder)!r} are done: {', '.join(parts)}.",
            advice="Finish all shards (the same commands go on where they stopped), then merge.",
        )
    kinds = sorted({kind for line in done.values() for kind in line["lines"]})
    counts = {}
    for kind in kinds:
        lines = {key: own for shard in shards for key, own in read_kind(folder, kind, shard)}
        counts[kind] = _replace(
            folder / f"{kind}.jsonl", (line for key in sorted(done) for line in lines[key])
        )
    # Last: only now does the folder count as one finished run.
    counts[DONE] = _replace(folder / f"{DONE}.jsonl", (done[key] for key in sorted(done)))
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


def _done_line(outcome: Outcome) -> dict[str, Any]:
    return {
        "id": outcome.id,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 3),
        "lines": {kind: len(lines) for kind, lines in outcome.lines.items()},
    }


def _whole(path: Path) -> Iterator[dict[str, Any]]:
    """The complete lines of a file; a half one at its end was cut off by a kill."""
    if not path.exists():
        return
    with path.open("rb") as stream:
        for line in stream:
            if line.endswith(b"\n"):
                yield json.loads(line)


def _cut(stream: BinaryIO, wanted: int) -> int:
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


def _replace(path: Path, lines: Iterable[Mapping[str, Any]]) -> int:
    """Writes a file of lines so that at any moment the old or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    with temporary.open("wb") as stream:
        for line in lines:
            stream.write((json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode())
            count += 1
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)
    return count
