"""What a stage leaves on the disk: lines of several kinds per record, and which records are done.

A stage turns one record (a picture, an instruction) into any number of lines of one or several
kinds: pairs for training, a line for the audit. All lines of a record are written and synced
first, then its line in ``done.jsonl``. A killed run therefore leaves at most lines whose record is
not done, and the next start drops exactly those: nothing is lost and nothing is there twice.

    out/run.json          everything that determines the lines
    out/pairs.jsonl       one file per kind; of a shard: pairs.shard-1-of-4.jsonl
    out/done.jsonl        {"id", "status", "seconds", "lines"}, the last word on a record

Records come in the order in which they were finished; ``lines`` counts what belongs to each.
`data_tools.merging` puts shards together.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from data_tools.done import (
    DONE,
    RUN,
    WHOLE,
    being_written,
    cut,
    damaged,
    finished,
    read_kind,
    too_short,
)
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

__all__ = ["DONE", "RUN", "Outcome", "StageOutput", "read_kind"]


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
        total: Number of records of the whole stage, all shards together; merging needs it.
        overwrite: Throw away what is there: of a run in one piece everything; of a shard its own
            files, and all others too if they belong to another run or another division (so that
            all shards of a run may be started with it, in any order).
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
        self._broken = False
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
        self._refuse_other_run(complete=False)

    def _check(self, *, complete: bool) -> None:
        """Refuses the folder of another run; notes what is done.

        Args:
            complete: Whether all facts of the run are known by now.
        """
        self.done = {}
        if self._refuse_other_run(complete=complete):
            self.done = {line["id"]: line["status"] for line in finished(self.path(DONE))}

    def _refuse_other_run(self, *, complete: bool) -> bool:
        """Compares run records only; tells whether there is an earlier session to go on with."""
        if self._overwrite:
            return False
        stored = self._stored_run()
        if stored is None:
            return False
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
        return True

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
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise damaged(path, "it is no JSON") from error
        if not isinstance(stored, dict):
            raise damaged(path, "it is no JSON object")
        return stored

    def __enter__(self) -> StageOutput:
        """Opens the files for this process alone, and drops lines whose record is not done."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with contextlib.ExitStack() as stack:
            # Until our files are open and locked, no other process may remove them.
            with locked(self.folder / RUN):
                if self._overwrite:
                    self._remove()
                    self._overwrite = False
                self._check(complete=True)
                if self._stored_run() is None:
                    write_json(self.folder / RUN, self._run)
                streams: dict[str, BinaryIO] = {
                    kind: stack.enter_context(self.path(kind).open("ab+"))
                    for kind in (DONE, *self.kinds)
                }
                try:
                    fcntl.flock(streams[DONE], fcntl.LOCK_EX | fcntl.LOCK_NB)
                except BlockingIOError:
                    raise _busy(self.path(DONE)) from None
            self._drop_unfinished(streams)
            self._closing = stack.pop_all()
        self._streams, self._broken = streams, False
        return self

    def _remove(self) -> None:
        """Removes what a stage wrote, and nothing else; see ``overwrite``.

        Raises:
            InputError: If another process is writing what would be removed.
        """
        path = self.folder / RUN
        try:
            stored = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
        except ValueError:
            stored = None
        siblings = self.shard.count > 1 and not any(differences(stored, self._run))
        division = f"-of-{self.shard.count}.jsonl"
        keep = {self.shard.path(Path(f"{kind}.jsonl")).name for kind in (DONE, *self.kinds)}
        found = [
            file
            for kind in (DONE, *self.kinds)
            for file in [self.folder / f"{kind}.jsonl", *self.folder.glob(f"{kind}.shard-*.jsonl")]
            if file.exists()
            and not (siblings and file.name.endswith(division) and file.name not in keep)
        ]
        for file in found:
            if being_written(file):
                raise _busy(file)
        if not siblings:
            path.unlink(missing_ok=True)
        for file in found:
            file.unlink()

    def _drop_unfinished(self, streams: Mapping[str, BinaryIO]) -> None:
        self.done = {}
        wanted: Counter[str] = Counter()
        for line in finished(self.path(DONE)):
            self.done[line["id"]] = line["status"]
            wanted.update(line["lines"])
        cut(streams[DONE], len(self.done))
        for kind in self.kinds:
            if cut(streams[kind], wanted[kind]) < wanted[kind]:
                raise too_short(self.path(kind))

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
            ValueError: Outside the ``with`` block, for an unknown kind, a record that is done, or
                after a write that failed: what it left could be taken for lines of other records.
            OSError: If the disk is full; what was written before stays valid.
        """
        if not self._streams:
            raise ValueError("write() works inside `with output:` only")
        if self._broken:
            raise ValueError("an earlier write failed; open the output again")
        new: dict[str, str] = {}
        for outcome in outcomes:
            if outcome.id in self.done or outcome.id in new:
                raise ValueError(f"record {outcome.id!r} is done already")
            if unknown := outcome.lines.keys() - set(self.kinds):
                raise ValueError(f"this stage has no lines of kind {sorted(unknown)[0]!r}")
            new[outcome.id] = outcome.status
        self._broken = True
        for kind in self.kinds:
            if lines := [line for one in outcomes for line in one.lines.get(kind, ())]:
                append_lines(self._streams[kind], lines)
        append_lines(self._streams[DONE], [_done_line(outcome) for outcome in outcomes])
        self._broken = False
        self.done |= new


def _done_line(outcome: Outcome) -> dict[str, Any]:
    return {
        "id": outcome.id,
        "status": outcome.status,
        "seconds": round(outcome.seconds, 3),
        "lines": {kind: len(lines) for kind, lines in outcome.lines.items()},
    }


def _busy(path: Path) -> InputError:
    return InputError(
        f"Another process is writing to {str(path)!r}.",
        advice="Wait for it, or choose another --output or another --shard.",
    )
