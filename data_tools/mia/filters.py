"""Which wrong answers become pairs: the filters of MIA-DPO, and their thresholds as a table.

A record becomes a pair (chosen: the source's answer, rejected: the model's) if the model answered
otherwise, was not overconfident, and did not look at the picture that was asked about (Liu et al.,
arXiv 2410.17637, as in their code). Two further filters compare the lengths and the letters of the
two answers; the paper names them without their thresholds, so those are ours.
"""

from __future__ import annotations

import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.done import read_kind
from data_tools.mia.records import (
    ALLOWED,
    ANSWER,
    COMPOSE,
    FILTER,
    GRID,
    PIP,
    SCORE,
    SEQUENCE,
    Pair,
    check_number,
    joined,
)
from data_tools.mia.texts import edit_distance, length_ratio, plain
from data_tools.records import Outcome
from mmlm.errors import InputError
from mmlm.sharding import Shard

__all__ = [
    "REASONS",
    "Filter",
    "Thresholds",
    "UnknownNumber",
    "check_numbers",
    "measured",
    "reason",
    "records_to_filter",
    "records_to_refilter",
]

REASONS = (
    "empty_answer", "empty_response", "long_answer", "dropped_equal", "no_attention",
    "low_perplexity", "looked_at_target", "length_ratio", "edit_distance",
)  # fmt: skip
"""Why a record does not become a pair, in the order in which the filters are applied."""

_BELOW: Mapping[str, Callable[[float, float], bool]] = {
    SEQUENCE: operator.le, GRID: operator.lt, PIP: operator.lt,
}  # fmt: skip
"""A sequence's ratio may equal its threshold, those of composed pictures may not (the code's)."""


class UnknownNumber(InputError, ValueError):  # noqa: N818
    """The table of thresholds has no entry for a record."""


@dataclass(frozen=True)
class Thresholds:
    """The table of thresholds.

    Attributes:
        sequence: Per number of pictures the greatest share of attention on the target that still
            counts as not having looked; in (0, 1] (the authors', as everything not marked).
        grid: The same for grids; the share must be smaller.
        pip: The same for pictures within pictures; the share must be smaller.
        ppl: The response's perplexity must be greater; >= 1.
        max_answer: The chosen answer must have fewer characters; >= 1.
        parity: Keep exactly what the authors' code keeps: the filters below are off.
        min_len_ratio: Words of the response per word of the answer, at least; >= 0 (ours).
        max_len_ratio: The same, at most (ours).
        edit_distance: Levenshtein distance over the greater length, in lower case without blanks
            around, at least; in [0, 1] (ours).

    Raises:
        ValueError: A value is out of its range, or a number of pictures is not one of the format's.
    """

    sequence: dict[int, float] = field(default_factory=lambda: {2: 0.8, 3: 0.7, 4: 0.6, 5: 0.6})
    grid: dict[int, float] = field(default_factory=lambda: {2: 0.7, 3: 0.6, 4: 0.5, 6: 0.4, 9: 0.3})
    pip: dict[int, float] = field(default_factory=lambda: {2: 0.8})
    ppl: float = 1.1
    max_answer: int = 512
    parity: bool = False
    min_len_ratio: float = 0.2
    max_len_ratio: float = 5.0
    edit_distance: float = 0.05

    def __post_init__(self) -> None:
        """Checks the values."""
        for name in ALLOWED:
            for n_images, value in getattr(self, name).items():
                check_number(name, n_images)
                if not 0 < value <= 1:
                    raise ValueError(f"thresholds of {name} must be in (0, 1], got {value}")
        if not self.ppl >= 1:
            raise ValueError(f"ppl must be at least 1, got {self.ppl}")
        if self.max_answer < 1:
            raise ValueError(f"max_answer must be at least 1, got {self.max_answer}")
        if not 0 <= self.min_len_ratio <= self.max_len_ratio:
            raise ValueError(
                f"0 <= min_len_ratio <= max_len_ratio must hold, got {self.min_len_ratio} and "
                f"{self.max_len_ratio}"
            )
        if not 0 <= self.edit_distance <= 1:
            raise ValueError(f"edit_distance must be in [0, 1], got {self.edit_distance}")

    def attention(self, format: str, n_images: int) -> float:
        """The threshold of the attention ratio.

        Raises:
            UnknownNumber: If the table has none; a ValueError. Nothing is dropped silently.
        """
        table: Mapping[int, float] = getattr(self, format) if format in ALLOWED else {}
        if n_images not in table:
            known = ", ".join(f"{name} {n}" for name in ALLOWED for n in getattr(self, name))
            raise UnknownNumber(
                f"There is no threshold for a {format} of {n_images} pictures; the table has: "
                f"{known}.",
                advice="Add it to the configuration of the filter.",
            )
        return table[n_images]

    def applied_to(self, format: str, n_images: int) -> dict[str, Any]:
        """The thresholds that a record of this kind is measured with, for its ``meta``."""
        ours = {
            "len_ratio": [self.min_len_ratio, self.max_len_ratio],
            "edit_distance": self.edit_distance,
        }
        return {
            "ratio": self.attention(format, n_images),
            "ppl": self.ppl,
            "max_answer": self.max_answer,
            **({} if self.parity else ours),
        }


def check_numbers(records: Iterable[Mapping[str, Any]], thresholds: Thresholds) -> None:
    """Makes sure, before any work, that the table has an entry for every record.

    Raises:
        UnknownNumber: Names the first that has none.
    """
    for format, n_images in sorted({(one["format"], one["n_images"]) for one in records}):
        thresholds.attention(format, n_images)


def measured(record: Mapping[str, Any]) -> Pair:
    """What the filters look at, from an instruction joined with its answer and its score.

    Args:
        record: See `data_tools.mia.records.joined`.

    Returns:
        A pair whose ``meta`` lacks the thresholds.
    """
    chosen, rejected = record["answer"], record["response"]
    return {
        "id": record["id"],
        "images": record["images"],
        "prompt": record["prompt_segments"],
        "chosen": chosen,
        "rejected": rejected,
        "ratio": record["ratio"],
        "ratios": record["ratios"],
        "ppl": record["ppl"],
        "len_ratio": length_ratio(rejected, chosen),
        "edit_distance": edit_distance(rejected, chosen),
        "format": record["format"],
        "n_images": record["n_images"],
        "target_index": record["target_index"],
        "meta": {key: record.get(key) for key in ("model", "layer", "corrupt_target", "decode")},
    }


def reason(pair: Mapping[str, Any], thresholds: Thresholds) -> str:
    """The first filter that a record does not pass; "" for a pair.

    Args:
        pair: See `measured`.
        thresholds: The table.

    Raises:
        UnknownNumber: If the table has no entry for this record.
    """
    limit = thresholds.attention(pair["format"], pair["n_images"])
    chosen, rejected = pair["chosen"], pair["rejected"]
    ours = not thresholds.parity
    ratio, ppl, lengths = pair["ratio"], pair["ppl"], pair["len_ratio"]
    tests = {
        "empty_answer": not chosen,
        "empty_response": not rejected,
        "long_answer": len(chosen) >= thresholds.max_answer,
        "dropped_equal": rejected == chosen or (ours and plain(rejected) == plain(chosen)),
        "no_attention": ratio is None or math.isnan(ratio),
        "low_perplexity": ppl is None or not ppl > thresholds.ppl,
    }
    failed = next((name for name, fails in tests.items() if fails), "")
    if failed:
        return failed
    if not _BELOW[pair["format"]](ratio, limit):
        return "looked_at_target"
    if ours and (
        lengths is None or not thresholds.min_len_ratio <= lengths <= thresholds.max_len_ratio
    ):
        return "length_ratio"
    return "edit_distance" if ours and pair["edit_distance"] < thresholds.edit_distance else ""


class Filter:
    """The stage ``filter``: pairs, and beside them whatever did not become one.

    The status of a record is ``ok`` or the filter that it did not pass. Records are either
    instructions joined with answer and score, or lines of an earlier filter stage.

    Args:
        thresholds: The table.
    """

    kinds = FILTER.kinds

    def __init__(self, thresholds: Thresholds) -> None:
        self._thresholds = thresholds

    def process(self, records: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        """Filters one record after the other."""
        for record in records:
            start = time.perf_counter()
            pair = dict(record if "chosen" in record else measured(record))
            pair.pop("reason", None)
            used = self._thresholds.applied_to(pair["format"], pair["n_images"])
            pair["meta"] = {**pair["meta"], "thresholds": used}
            failed = reason(pair, self._thresholds)
            kind, status = ("dropped", failed) if failed else ("pairs", "ok")
            line = {**pair, "reason": failed} if failed else pair
            yield Outcome(pair["id"], status, {kind: [line]}, time.perf_counter() - start)


def records_to_filter(root: Path, shard: Shard) -> list[dict[str, Any]]:
    """All records that were answered and scored.

    Raises:
        InputError: If a stage before is missing.
    """
    return joined(root, (COMPOSE, ANSWER, SCORE), shard)


def records_to_refilter(root: Path) -> list[dict[str, Any]]:
    """All lines of the filter stage, kept or dropped, to be measured with other thresholds.

    Raises:
        InputError: If it has not been run, or is there in shards only.
    """
    folder = root / FILTER.name
    lines = [
        line for kind in FILTER.kinds for _, lines in read_kind(folder, kind) for line in lines
    ]
    return sorted(lines, key=lambda line: line["id"])
