"""One run divided among several processes or machines, and put together again.

A record belongs to shard ``crc32(id) mod n``: a rule without state, so that shards need not know
of each other and a record stays in its shard whatever else is in the file. Every shard writes a
file of its own beside the file of the whole run, and whichever shard finishes last puts the whole
one together, in the order of the data set: no process waits for another.
"""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.errors import InputError
from mmlm.records import RecordFile, locked

__all__ = ["Shard", "merge", "this_shard"]


@dataclass(frozen=True)
class Shard:
    """One part of a run.

    Args:
        index: Which part, from 0.
        count: Number of parts; >= 1.
    """

    index: int = 0
    count: int = 1

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If ``index`` is not in [0, count).
        """
        if not 0 <= self.index < self.count:
            raise ValueError(f"a shard i/n needs 0 <= i < n, got {self}")

    def __str__(self) -> str:
        """``i/n``, as on the command line."""
        return f"{self.index}/{self.count}"

    def owns(self, identifier: str) -> bool:
        """Whether a record belongs to this part."""
        return zlib.crc32(identifier.encode()) % self.count == self.index

    def path(self, whole: Path) -> Path:
        """Where this part is written, given the file of the whole run."""
        if self.count == 1:
            return whole
        return whole.with_name(f"{whole.stem}.shard-{self.index}-of-{self.count}{whole.suffix}")


def this_shard(text: str = "") -> Shard:
    """The part of this process: as the user wrote it, else as the launcher numbered it.

    ``accelerate launch`` and ``torchrun`` set RANK and WORLD_SIZE; without them and without
    ``text`` there is one part.

    Args:
        text: ``i/n`` with i from 0 to n-1, or empty.

    Raises:
        InputError: If the text is no such pair, or a launcher has divided the run already.
    """
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if not text:
        return Shard(int(os.environ.get("RANK", "0")), ranks) if ranks > 1 else Shard()
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not int(match[1]) < int(match[2]):
        raise InputError(
            f"--shard does not take {text!r}.",
            advice="Write i/n with i from 0 to n-1: 0/4 ... 3/4",
        )
    if ranks > 1:
        raise InputError(
            f"--shard {text} is given, but the launcher has started {ranks} processes that divide "
            "the run among themselves.",
            advice="Leave out --shard, or start one process per shard.",
        )
    return Shard(int(match[1]), int(match[2]))


def merge(
    whole: Path, count: int, run: Mapping[str, Any], order: Sequence[str]
) -> tuple[RecordFile, list[int]]:
    """Puts the parts of a run together, if all of them are finished.

    Args:
        whole: The file of the whole run; written only when nothing is missing.
        count: Number of parts.
        run: Run record of the whole run; those of the parts say which ``shard`` they are as well.
        order: Identifiers of all records, in the order of the data set.

    Returns:
        The whole file, and the parts that are not finished; it is complete if there are none.

    Raises:
        InputError: If a part belongs to another run, or is damaged.
    """
    with locked(whole):
        records = RecordFile(whole, run)
        if len(records.done) == len(order):
            return records, []
        done: dict[str, dict[str, Any]] = {}
        unfinished = []
        for shard in (Shard(index, count) for index in range(count)):
            wanted = {identifier for identifier in order if shard.owns(identifier)}
            part = RecordFile(shard.path(whole), {**run, "shard": str(shard)}).done
            if wanted - part.keys():
                unfinished.append(shard.index)
            done |= part
        if not unfinished:
            with records:
                new = [identifier for identifier in order if identifier not in records.done]
                records.append([done[identifier] for identifier in new])
        return records, unfinished
