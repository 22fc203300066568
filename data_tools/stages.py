"""How a stage runs over many records: resumed, sharded, one line of progress, in one process.

A stage is an object with a ``process`` method over any number of records; what it computes does
not depend on which other records it was given. That is all that sharding, resuming and actors on
other machines (`data_tools.ray_stage`) need.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, Protocol, TypeVar

from data_tools.records import Outcome, StageOutput
from mmlm.errors import InputError
from mmlm.progress import progress_bar

__all__ = ["Record", "Stage", "batched", "check_ids", "pending", "planned", "run_stage", "tracked"]

T = TypeVar("T")
Record = Mapping[str, Any]
"""One record of a stage's input: JSON values, with an ``id``."""


class Stage(Protocol):
    """One step of a pipeline.

    Attributes:
        kinds: Names of the files of lines it writes.
    """

    kinds: tuple[str, ...]

    def process(self, records: Iterable[Record]) -> Iterator[Outcome]:
        """Works on records, several at once if it likes.

        Args:
            records: The records; taken from the iterable when there is room for them.

        Yields:
            One outcome per record, in any order, as soon as it is there.
        """


def batched(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Cuts anything into lists of ``size`` items, the last one shorter; takes as it goes."""
    rest = iter(items)
    while part := list(islice(rest, size)):
        yield part


def planned(
    records: Iterable[Record], plan: Sequence[Record] | None, size: int
) -> Iterator[tuple[list[Record], set[str]]]:
    """Cuts records into windows whose borders do not depend on what is done already.

    Args:
        records: What is left to do.
        plan: All records of the run; None: the windows are cut from ``records``.
        size: Records per window.

    Yields:
        A window and the identifiers in it that are left to do; windows with none are left out.
    """
    if plan is None:
        for window in batched(records, size):
            yield window, {record["id"] for record in window}
        return
    left = {record["id"] for record in records}
    for window in batched(plan, size):
        if wanted := {record["id"] for record in window} & left:
            yield window, wanted


def check_ids(records: Sequence[Record], source: str) -> None:
    """Refuses records without an identifier, or with one that is there twice.

    Args:
        records: The records.
        source: Where they come from, for the message.

    Raises:
        InputError: Names the first offender.
    """
    counts: Counter[Any] = Counter()
    for number, record in enumerate(records, start=1):
        identifier = record.get("id")
        if not isinstance(identifier, str) or not identifier:
            raise InputError(
                f"{source}, record {number}: `id` must be text, got {identifier!r}.",
                advice="Give every record its own id.",
            )
        counts[identifier] += 1
    if twice := [identifier for identifier, count in counts.items() if count > 1]:
        raise InputError(
            f"{source}: the id {twice[0]!r} is there {counts[twice[0]]} times.",
            advice="Give every record its own id.",
        )


def pending(records: Sequence[Record], output: StageOutput) -> list[Record]:
    """The records of the output's shard that are not done; the output must be open."""
    mine = (record for record in records if output.shard.owns(record["id"]))
    return [record for record in mine if record["id"] not in output.done]


def run_stage(
    stage: Stage, records: Sequence[Record], output: StageOutput, *, progress: bool = False
) -> Counter[str]:
    """Runs a stage over what is not done yet, and stores every outcome as it comes.

    Args:
        stage: The stage, its models loaded.
        records: All records of the stage, whatever the shard.
        output: Where the lines go; opened by this function.
        progress: Show a progress bar on standard error.

    Returns:
        How many records have which status, earlier sessions included.
    """
    check_ids(records, "The input")
    mine = sum(output.shard.owns(record["id"]) for record in records)
    with output, tracked(mine, progress) as advance:
        todo = pending(records, output)
        advance(mine - len(todo), "")
        for outcome in stage.process(todo):
            output.write([outcome])
            advance(1, outcome.status)
    return Counter(output.done.values())


@contextlib.contextmanager
def tracked(total: int, show: bool, title: str = "records") -> Iterator[Callable[[int, str], None]]:
    """A progress bar on standard error that also counts statuses other than ok.

    Args:
        total: Number of records.
        show: Whether to draw it.
        title: What is counted.

    Yields:
        A function of a number of records and their status that advances the bar.
    """
    statuses: Counter[str] = Counter()
    with progress_bar(total, show, title) as advance:

        def count(number: int, status: str) -> None:
            if status and status != "ok":
                statuses[status] += number
            advance(number, ", ".join(f"{n} {name}" for name, n in statuses.most_common(3)))

        yield count
