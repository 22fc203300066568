"""Stored answers of any benchmark, scored by what their run record says they are.

`mmlm bench` leaves a run record beside its answers, which names the benchmark and the variant of
the scorer; that is enough to score the answers again. Answers from elsewhere have no run record:
for those the caller names the benchmark.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.judges.judged import read_answers
from benchmarks.reports.scorers import SCORERS
from mmlm.errors import InputError
from mmlm.records import INFORMATION, run_record_path

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.base import Scored
    from benchmarks.run import Task

__all__ = ["StoredRun", "provisions", "read_run", "score_file"]


@dataclass(frozen=True)
class StoredRun:
    """Stored answers with what is known about them.

    Attributes:
        path: The file of answers.
        benchmark: Name of the benchmark.
        record: The run record; empty for answers from elsewhere.
        lines: The answers as stored.
        scored: Their scores.
    """

    path: Path
    benchmark: str
    record: Mapping[str, Any] = field(repr=False)
    lines: Sequence[Mapping[str, Any]] = field(repr=False)
    scored: Scored = field(repr=False)

    @property
    def pictures(self) -> Path | None:
        """Folder of the pictures, if the run record names one."""
        folder = self.record.get(INFORMATION, {}).get("images")
        return Path(folder) if isinstance(folder, str) else None

    @property
    def failed(self) -> int:
        """Number of requests that have an error instead of an answer."""
        return sum(bool(line.get("error")) for line in self.lines)


def provisions(task: Task) -> dict[str, Any]:
    """What reading a run's answers later will ask for; goes into the run record's information.

    Args:
        task: The requests.

    Returns:
        ``requests``: their number, which tells a finished run; ``images``: the folder in which the
        file names of the stored lines are found, if the pictures are files of one folder.
    """
    folders = set()
    for item in task.items:
        name = item.facts.get("image")
        for source in item.request.images:
            path = str(Path(source).resolve()) if isinstance(source, str | Path) else ""
            if isinstance(name, str) and name and path.endswith(f"/{name}"):
                folders.add(path.removesuffix(f"/{name}"))
    found: dict[str, Any] = {"requests": len(task.items)}
    return found | ({"images": folders.pop()} if len(folders) == 1 else {})


def score_file(path: str | Path, variant: str | None = None) -> Scored:
    """Scores stored answers as their run record says.

    Args:
        path: The output folder of `mmlm bench`, or the file of answers in it.
        variant: Variant of the scorer. Default: that of the run.

    Raises:
        InputError: If there is no run record, or the answers cannot be scored.
    """
    return read_run(path, variant=variant).scored


def read_run(
    path: str | Path,
    *,
    benchmark: str | None = None,
    variant: str | None = None,
    information: Mapping[str, Any] | None = None,
) -> StoredRun:
    """Reads and scores stored answers.

    Args:
        path: The output folder of `mmlm bench`, or a file of answers.
        benchmark: Name of the benchmark, for answers without a run record.
        variant: Variant of the scorer. Default: that of the run, else the benchmark's default.
        information: Replaces what the run record says, e.g. where annotations lie now.

    Raises:
        InputError: If the benchmark is not known, the run is not finished, or the answers cannot
            be read or scored.
    """
    file = _answers_in(Path(path))
    record = _record_of(file)
    name = _benchmark(file, record, benchmark)
    lines = read_answers(file)  # with the verdicts of a judge, if there are any
    known = record.get(INFORMATION, {})
    _check_finished(file, name, lines, known.get("requests"))
    if variant is None:
        variant = str(known.get("scorer", "")).partition("/")[2]
    scored = SCORERS[name](lines, variant, {**known, **(information or {})})
    return StoredRun(file, name, record, lines, scored)


def _answers_in(path: Path) -> Path:
    """The file of answers: the path itself, or the only one with a run record in that folder."""
    if not path.exists():
        raise InputError(f"There is no file or folder {str(path)!r}.", advice="Check the path.")
    if not path.is_dir():
        return path
    suffix = run_record_path(Path("x")).name[1:]
    records = sorted(path.glob(f"*{suffix}"))
    files = [record.with_name(record.name.removesuffix(suffix)) for record in records]
    whole = [file for file in files if ".shard-" not in file.name]
    if not whole and files:
        raise InputError(
            f"{path} holds parts of a run only ({len(files)} shards so far).",
            advice="Run the remaining shards; the last one puts all together.",
        )
    if len(whole) != 1:
        names = ", ".join(file.name for file in whole) or "none"
        raise InputError(
            f"{path} should hold the answers of one run; it has {names}.",
            advice="Give the file of answers itself, or the output folder of `mmlm bench`.",
        )
    return whole[0]


def _record_of(file: Path) -> dict[str, Any]:
    path = run_record_path(file)
    if not path.is_file():
        return {}
    advice = "Remove it and give --benchmark, or repeat the run."
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or bytes that are no UTF-8
        raise InputError(f"The run record {path} is damaged ({error}).", advice=advice) from error
    if not isinstance(record, dict) or not isinstance(record.get(INFORMATION, {}), dict):
        raise InputError(f"The run record {path} is damaged: parts are missing.", advice=advice)
    return record


def _benchmark(file: Path, record: Mapping[str, Any], given: str | None) -> str:
    """Which benchmark a file answers: as its run record says, else as the caller does."""
    kind, _, named = str(record.get("command", "")).partition(" ")
    own = named if kind == "bench" else None
    if own and given and own != given:
        raise InputError(
            f"{file} holds answers of {own}, not of {given}.", advice="Leave out --benchmark."
        )
    name = own or given
    if name is None:
        raise InputError(
            f"{file} has no run record of `mmlm bench` ({run_record_path(file).name}), so nobody "
            "knows which benchmark it answers.",
            advice=f"Give --benchmark, one of {', '.join(SCORERS)}.",
        )
    if name not in SCORERS:
        raise InputError(
            f"{file}: there is no way to score answers of {name!r} from the file alone.",
            advice=f"Known are: {', '.join(SCORERS)}.",
        )
    return name


def _check_finished(file: Path, name: str, lines: Sequence[Any], requests: object) -> None:
    waiting = file.with_name(file.name + ".early")
    short = isinstance(requests, int) and len(lines) < requests
    if short or waiting.is_file():
        of = f" of {requests}" if isinstance(requests, int) else ""
        raise InputError(
            f"The run of {file} is not finished: {len(lines)}{of} answers.",
            advice=f"Give the same `mmlm bench {name}` again: it goes on where it stopped.",
        )
