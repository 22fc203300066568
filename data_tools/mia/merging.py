"""Shards of all stages put together, and the pairs in one shuffled file."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.done import DONE, finished, read_kind
from data_tools.merging import merge_shards
from data_tools.mia.records import FILTER, PAIRS, STEPS, Step, shuffled
from mmlm.errors import InputError

__all__ = ["Merged", "merge", "write_pairs"]


@dataclass(frozen=True)
class Merged:
    """What was put together.

    Attributes:
        shards: Stages that were there in shards, with their numbers of records.
        pairs: Number of pairs.
        output: Their file.
    """

    shards: Mapping[str, int]
    pairs: int
    output: Path


def merge(root: Path, seed: int = 0) -> Merged:
    """Merges the shards of every stage, checks that none is behind, and shuffles the pairs.

    Args:
        root: OUT.
        seed: Seed of the order of the pairs.

    Raises:
        InputError: If a stage is missing, in part or as a whole, or has not worked on everything
            that the stage before it left.
    """
    counts = {}
    for step in STEPS:
        folder = root / step.name
        if any(folder.glob(f"{DONE}.shard-*.jsonl")):
            counts[step.name] = merge_shards(folder)[DONE]
    for before, after in itertools.pairwise(STEPS):
        _check_complete(root, before, after)
    output = root / PAIRS
    return Merged(counts, write_pairs(root / FILTER.name, output, seed), output)


def write_pairs(folder: Path, output: Path, seed: int) -> int:
    """Writes the pairs of a filter stage into one shuffled file.

    Args:
        folder: The stage's folder, whole.
        output: The file; it is replaced.
        seed: Seed of the order.

    Returns:
        The number of pairs.
    """
    lines = shuffled((line for _, own in read_kind(folder, "pairs") for line in own), seed)
    _replace(output, lines)
    return len(lines)


def _check_complete(root: Path, before: Step, after: Step) -> None:
    done = {line["id"] for line in finished(root / after.name / f"{DONE}.jsonl")}
    lines = read_kind(root / before.name, before.kinds[0])
    missing = [key for key, own in lines if own and key not in done]
    if missing:
        raise InputError(
            f"{after.name} has not worked on {len(missing)} records that {before.name} left, "
            f"{missing[0]!r} among them.",
            advice=f"Go on with it: mmlm data mia {after.name}",
        )


def _replace(path: Path, lines: Sequence[Mapping[str, Any]] | Iterable[Mapping[str, Any]]) -> None:
    """Writes a file of lines so that at any moment the old or the new one is there, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("w", encoding="utf-8") as stream:
            for line in lines:
                stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
