"""Append-only JSON lines that survive a kill, and the record of the run that made them.

One line per finished record. Lines are written in whole batches: one write, flushed and synced to
the disk, so a killed run leaves complete lines and at most one half line, which the next start
drops. Records that come before their turn wait in a journal beside the file, so that the file is
always a beginning of the data set. Beside ``answers.jsonl`` stands ``answers.jsonl.run.json``:
everything that determines the answers. A file that another run made is never touched.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

from mmlm.errors import InputError

__all__ = [
    "RecordFile",
    "append_lines",
    "differences",
    "file_hash",
    "locked",
    "plain_json",
    "read_lines",
    "run_record_path",
    "write_json",
]

INFORMATION = "information"
"""The part of a run record that does not decide whether two runs are the same (versions, ...)."""


def run_record_path(output: Path) -> Path:
    """Where the run record of an output file stands: ``<output>.run.json``."""
    return output.with_name(output.name + ".run.json")


def file_hash(path: Path) -> str:
    """SHA-256 of a file, ``sha256:<hex>``."""
    with path.open("rb") as stream:
        return f"sha256:{hashlib.file_digest(stream, 'sha256').hexdigest()}"


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Reads a JSON lines file; blank lines are skipped.

    Args:
        path: The file.

    Returns:
        One object per line.

    Raises:
        InputError: If the file is missing, is no UTF-8 text, or a line is no JSON object (names
            the line).
    """
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.", advice="Check the path.")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{str(path)!r} is no UTF-8 text ({error}).", advice="Save it as UTF-8 JSON lines."
        ) from error
    # Not splitlines(): JSON strings may hold other line separators (U+2028) unescaped.
    lines = enumerate(text.split("\n"), start=1)
    return [_parse_line(path, number, line) for number, line in lines if line.strip()]


def _parse_line(path: Path, number: int, line: str | bytes) -> dict[str, Any]:
    try:
        value = json.loads(line)
    except ValueError as error:  # no JSON, or bytes that are no UTF-8
        raise InputError(
            f"{path}, line {number} is no JSON: {error}.",
            advice="Every line must be one JSON object.",
        ) from error
    if not isinstance(value, dict):
        raise InputError(
            f"{path}, line {number} is a {type(value).__name__}, not an object.",
            advice='Every line must be one JSON object, e.g. {"id": "1", ...}.',
        )
    return value


def write_json(path: Path, value: Any) -> None:
    """Writes a JSON file so that at any moment either the old or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        json.dump(value, stream, indent=2, ensure_ascii=False, allow_nan=False)
        stream.write("\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


@contextlib.contextmanager
def locked(path: Path) -> Iterator[None]:
    """Makes other processes wait that want to prepare the same file or folder.

    Args:
        path: What is prepared; the lock is a hidden file beside it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.lock").open("ab") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


class RecordFile:
    """An output file of one run: knows what is done, appends what is new.

    Creating the object only reads and checks; nothing is written before the ``with`` block, so all
    refusals come before any work::

        records = RecordFile(path, run)
        ... load the model ...
        with records:
            records.append([{"id": "1", "text": "a dog"}])

    Args:
        path: The output file; need not exist.
        run: What determines the answers (JSON values). The key ``information`` is stored but not
            compared.
        key: The field that identifies a record.

    Attributes:
        done: Finished records by their identifier, in file order; those in the journal follow.

    Raises:
        InputError: If the file belongs to another run, has no run record, or is damaged other than
            by a half last line.
    """

    def __init__(self, path: Path, run: Mapping[str, Any], key: str = "id") -> None:
        self.path = path
        self.done: dict[Any, dict[str, Any]] = {}
        self._key = key
        self._run = plain_json(run)
        self._order: list[Any] = []
        self._written = 0
        self._early: dict[Any, dict[str, Any]] = {}
        self._stream: BinaryIO | None = None
        if not path.parent.is_dir():
            raise InputError(
                f"There is no folder {str(path.parent)!r} for the output.",
                advice="Create it, or choose another --output.",
            )
        self._read(complete=False)

    def in_order(self, identifiers: Sequence[Any]) -> None:
        """Fixes the order of the lines, so that records may be appended in any other.

        A record whose predecessors are missing waits in a journal, as safe from a kill as the file.

        Args:
            identifiers: All records that the file will hold.

        Raises:
            InputError: If the file does not begin like this order.
        """
        self._order = list(identifiers)
        lines = [identifier for identifier in self.done if identifier not in self._early]
        if lines != self._order[: len(lines)] or not self.done.keys() <= set(self._order):
            raise InputError(
                f"The lines of {str(self.path)!r} are not in the order of the data set.",
                advice="Choose another --output.",
            )
        if self._stream is not None:
            self._write([])

    def add_facts(self, facts: Mapping[str, Any]) -> None:
        """Adds to the run what is known only after loading, e.g. a hash of the weights.

        Raises:
            InputError: If the file turns out to belong to another run.
        """
        self._run |= plain_json(facts)
        self._read(complete=False)

    def _read(self, *, complete: bool) -> None:
        """Checks that the file is ours, and notes what it holds.

        Args:
            complete: Whether all facts of the run are known by now.
        """
        path, journal = self.path, self._journal
        self.done.clear()
        self._early.clear()
        if path.exists() and not path.is_file():
            raise InputError(
                f"The output {str(path)!r} is no regular file.", advice="Choose another --output."
            )
        data = path.read_bytes() if path.exists() else b""
        waiting = journal.read_bytes() if journal.exists() else b""
        if not data and not waiting:
            return
        self._check_run(complete)
        for number, line in enumerate(_whole_lines(data).splitlines(), start=1):
            record = _parse_line(path, number, line)
            identifier = record.get(self._key)
            if identifier is None or identifier in self.done:
                raise InputError(
                    f"{path}, line {number}: the {self._key} {identifier!r} is missing or there "
                    "twice; the file was changed since it was written.",
                    advice="Restore the file, or choose another --output.",
                )
            self.done[identifier] = record
        self._written = len(self.done)
        for number, line in enumerate(_whole_lines(waiting).splitlines(), start=1):
            record = _parse_line(journal, number, line)
            # What a killed run had moved to the file already is still in the journal.
            if record[self._key] not in self.done:
                self.done[record[self._key]] = self._early[record[self._key]] = record

    @property
    def _journal(self) -> Path:
        return self.path.with_name(self.path.name + ".early")

    def _check_run(self, complete: bool) -> None:
        path = run_record_path(self.path)
        advice = "Choose another --output; nothing was changed."
        if not path.is_file():
            raise InputError(
                f"The output {str(self.path)!r} exists, but without its run record "
                f"{path.name!r}: it was not written by this command.",
                advice=advice,
            )
        try:
            stored = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise InputError(f"The run record {str(path)!r} is damaged.", advice=advice) from error
        different = [
            f"{name} was {old}, now {new}"
            for name, old, new in differences(stored, self._run)
            if complete or name.partition(".")[0] in self._run
        ]
        if different:
            raise InputError(
                f"The output {str(self.path)!r} belongs to another run: {'; '.join(different)}.",
                advice=advice,
            )

    def __enter__(self) -> RecordFile:
        """Opens the file for this process alone, drops a half last line, writes the run record."""
        stream = self.path.open("ab+")
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            stream.close()
            raise InputError(
                f"Another process is writing to {str(self.path)!r}.",
                advice="Wait for it, or choose another --output (with --shard i/n one per shard).",
            ) from None
        # Between reading and locking another run may have written or finished.
        self._read(complete=True)
        stream.seek(0)
        stream.truncate(len(_whole_lines(stream.read())))
        if not self.done:
            write_json(run_record_path(self.path), self._run)
        self._stream = stream
        if self._journal.exists():
            os.truncate(self._journal, len(_whole_lines(self._journal.read_bytes())))
            self._write([])
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Closes the file, which also releases the lock."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if self._order:
            self.done = {one: self.done[one] for one in self._order if one in self.done}

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Writes records at once and waits until they are on the disk.

        Raises:
            ValueError: Outside the ``with`` block, or if an identifier is already there.
        """
        if self._stream is None:
            raise ValueError("append() works inside `with records:` only")
        for record in records:
            if record[self._key] in self.done:
                raise ValueError(f"{self._key} {record[self._key]!r} was already written")
            self.done[record[self._key]] = dict(record)
        self._write(records)

    def _write(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Puts records on the disk: in the file as far as it is their turn, else in the journal."""
        if not self._order:
            append_lines(self._stream, records)
            return
        waiting = self._early | {record[self._key]: dict(record) for record in records}
        ready = []
        for identifier in self._order[self._written :]:
            if identifier not in waiting:
                break
            ready.append(waiting.pop(identifier))
        if new := [one for key, one in waiting.items() if key not in self._early]:
            with self._journal.open("ab") as journal:
                append_lines(journal, new)
        if ready:
            append_lines(self._stream, ready)
        self._written += len(ready)
        self._early = waiting
        if not waiting:
            self._journal.unlink(missing_ok=True)


def append_lines(stream: BinaryIO, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes records at once and waits until they are on the disk."""
    lines = "".join(
        json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n" for record in records
    )
    stream.write(lines.encode("utf-8"))
    stream.flush()
    os.fsync(stream.fileno())


def _whole_lines(data: bytes) -> bytes:
    """Everything up to the last line end: what follows was cut off by a kill."""
    return data[: data.rfind(b"\n") + 1]


def plain_json(value: Any) -> Any:
    """A value as it comes back from a JSON file: tuples as lists, keys as text."""
    return json.loads(json.dumps(value))


def differences(old: Any, new: Any, name: str = "") -> Iterable[tuple[str, Any, Any]]:
    """Where two run records differ, the key ``information`` left out.

    Args:
        old: The stored one.
        new: The one of this run, as plain JSON values.
        name: Dotted name of what is compared.

    Yields:
        Dotted name, old value, new value.
    """
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            if name or key != INFORMATION:
                path = f"{name}.{key}" if name else key
                yield from differences(old.get(key), new.get(key), path)
    elif old != new:
        yield name or "record", old, new
