"""What all benchmarks share: measures that may be undefined, and strict reading of stored lines.

Scoring is a pure function of stored lines. A benchmark turns every sample into a row of counts;
`CountTable` adds the rows up per image, and every published number is a `Measure` of the sums:
value, numerator, denominator and bootstrap interval together, so that no ratio travels without its
counts and a ratio with denominator zero is said to be undefined instead of being invented.
"""

from __future__ import annotations

import gzip
import json
import zlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

import numpy as np

from benchmarks import stats
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence

__all__ = [
    "CountTable",
    "Counted",
    "Direction",
    "Mark",
    "Measure",
    "Ratio",
    "Sample",
    "Scored",
    "Scores",
    "read_json",
    "read_records",
]

Direction = Literal["lower", "higher", "none"]
"""Which way a metric is better; "none" for what is neither good nor bad, such as a yes ratio."""


@dataclass(frozen=True)
class Ratio:
    """A metric as a quotient of summed counts.

    Attributes:
        numerator: Count columns that are added up above the line.
        denominator: Count columns that are added up below it.
        factor: Constant factor of the quotient (2 for an F1 value).
        needs: Columns whose sum must be positive for the metric to exist; F1 needs one true
            positive, because with none precision + recall is 0.
    """

    numerator: tuple[str, ...]
    denominator: tuple[str, ...]
    factor: float = 1.0
    needs: tuple[str, ...] = ()

    def prefixed(self, prefix: str) -> Ratio:
        """The same ratio on columns named ``prefix.column``."""

        def rename(names: tuple[str, ...]) -> tuple[str, ...]:
            return tuple(f"{prefix}.{name}" for name in names)

        return Ratio(
            rename(self.numerator), rename(self.denominator), self.factor, rename(self.needs)
        )


@dataclass(frozen=True)
class Measure:
    """One number with its evidence.

    Attributes:
        value: The ratio as a fraction; None if undefined.
        numerator: What stands above the line.
        denominator: What stands below it; 0 makes the measure undefined.
        interval: Bootstrap interval over images, if asked for and defined.
    """

    value: float | None
    numerator: float
    denominator: float
    interval: stats.Interval | None = None

    @property
    def undefined(self) -> bool:
        """Whether the ratio does not exist."""
        return self.value is None

    def as_json(self) -> dict[str, Any]:
        """Plain JSON form; an undefined value is ``null`` and says so."""
        record: dict[str, Any] = {"value": self.value}
        if self.undefined:
            record["undefined"] = True
        record |= {"numerator": _plain(self.numerator), "denominator": _plain(self.denominator)}
        if self.interval is not None:
            record["interval"] = [self.interval.low, self.interval.high]
            record["level"] = self.interval.level
        return record


@dataclass(frozen=True)
class CountTable:
    """Counts per image and the ratios defined on their sums.

    Attributes:
        columns: Names of the counts.
        images: Image ids, in the order of the rows.
        counts: Counts [images, columns].
        ratios: The metrics by name; a tuple of ratios stands for their mean.
    """

    columns: tuple[str, ...]
    images: tuple[Hashable, ...]
    counts: np.ndarray = field(repr=False)
    ratios: Mapping[str, Ratio | tuple[Ratio, ...]] = field(repr=False)

    @classmethod
    def build(
        cls,
        images: Sequence[Hashable],
        rows: Sequence[Mapping[str, float]],
        ratios: Mapping[str, Ratio | tuple[Ratio, ...]],
    ) -> CountTable:
        """Adds up one row of counts per sample into one row per image."""
        columns = tuple(rows[0]) if rows else ()
        counts = stats.group_counts(images, [[row[name] for name in columns] for row in rows])
        return cls(columns, tuple(sorted(set(images), key=str)), counts, ratios)

    def sums(self) -> dict[str, int | float]:
        """Every count, added up over all images."""
        return {
            name: _plain(value)
            for name, value in zip(self.columns, self.counts.sum(axis=0), strict=True)
        }

    def measure(self, name: str, *, resamples: int = 0, seed: int = 0) -> Measure:
        """One metric; with a bootstrap interval if ``resamples`` is positive."""
        total = self.counts.sum(axis=0)
        value = float(self._statistic(name)(total))
        interval = None
        if resamples:
            interval = stats.bootstrap_interval(
                self.counts, self._statistic(name), resamples=resamples, seed=seed
            )
        parts = self._parts(name)
        return Measure(
            value if np.isfinite(value) else None,
            sum(part.factor * float(self._sum(total, part.numerator)) for part in parts),
            sum(float(self._sum(total, part.denominator)) for part in parts),
            interval,
        )

    def measures(self, *, resamples: int = 0, seed: int = 0) -> dict[str, Measure]:
        """All metrics by name."""
        return {name: self.measure(name, resamples=resamples, seed=seed) for name in self.ratios}

    def difference(
        self, other: CountTable, name: str, *, resamples: int = stats.RESAMPLES, seed: int = 0
    ) -> stats.Difference:
        """``other - self`` in one metric, paired over images.

        Raises:
            InputError: If the two tables are about different images.
        """
        if self.images != other.images:
            differing = len(set(self.images) ^ set(other.images))
            raise InputError(
                f"A paired comparison needs the same images; {differing} stand in one run only.",
                advice="Score both runs on one data set, or compare their intervals instead.",
            )
        return stats.paired_bootstrap(
            self.counts, other.counts, self._statistic(name), resamples=resamples, seed=seed
        )

    def _parts(self, name: str) -> tuple[Ratio, ...]:
        ratio = self.ratios[name]
        return (ratio,) if isinstance(ratio, Ratio) else ratio

    def _sum(self, sums: np.ndarray, names: Sequence[str]) -> np.ndarray:
        return sums[..., [self.columns.index(name) for name in names]].sum(axis=-1)

    def _value(self, sums: np.ndarray, part: Ratio) -> np.ndarray:
        value = part.factor * stats.ratio(
            self._sum(sums, part.numerator), self._sum(sums, part.denominator)
        )
        return np.where(self._sum(sums, part.needs) > 0, value, np.nan) if part.needs else value

    def _statistic(self, name: str) -> stats.Statistic:
        parts = self._parts(name)
        return lambda sums: np.mean([self._value(sums, part) for part in parts], axis=0)


@dataclass(frozen=True, slots=True)
class Mark:
    """A part of an answer that a reader should see.

    Attributes:
        start: First character of the part in the answer.
        end: The character behind its last one.
        kind: "bad" (invented, wrong) or "good" (in the picture, right).
        title: What the scorer made of it, shown on hovering.
    """

    start: int
    end: int
    kind: Literal["bad", "good"]
    title: str = ""


@dataclass(frozen=True, slots=True)
class Sample:
    """One scored answer, for people who want to see what a number consists of.

    Attributes:
        id: The id of the stored line.
        image: The picture's file name, or its id where the file is not known; "" for none.
        question: What was asked.
        answer: What the model said.
        correct: Whether it counts as right; None if it counts as neither.
        note: What the scorer made of it, in a few words: "expected yes", "2 invented".
        marks: Parts of the answer that were found right or wrong, in order.
        unit: What the table counts it under, where that is neither the picture nor the id.
    """

    id: str
    image: str
    question: str
    answer: str
    correct: bool | None
    note: str = ""
    marks: tuple[Mark, ...] = ()
    unit: str = ""


class Scored(Protocol):
    """What the runner, the tables and `mmlm compare` need to know about a scored file."""

    @property
    def name(self) -> str:
        """Name under which the numbers may be published, scorer variant included."""

    @property
    def table(self) -> CountTable:
        """Counts per image and the metrics on their sums."""

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Which way each metric of the table is better; the first one is the headline."""

    @property
    def good(self) -> tuple[str, ...]:
        """Count columns of which an image should have many."""

    @property
    def bad(self) -> tuple[str, ...]:
        """Count columns of which an image should have few."""

    @property
    def samples(self) -> Sequence[Sample]:
        """The scored answers, in the order of the file."""

    def as_json(self, *, resamples: int = ..., seed: int = ...) -> dict[str, Any]:
        """Everything but the answers, as plain JSON."""


class Counted:
    """What follows from a name and a table of counts, the same for every kind of scores."""

    name: str
    table: CountTable

    @property
    def metrics(self) -> dict[str, float | None]:
        """Every metric as a fraction; None where undefined."""
        return {name: measure.value for name, measure in self.table.measures().items()}

    @property
    def counts(self) -> dict[str, int | float]:
        """The sums behind the metrics, and the number of images."""
        return {"images": len(self.table.images), **self.table.sums()}

    def measures(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Measure]:
        """Every metric with its counts and a 95 % bootstrap interval over images."""
        return self.table.measures(resamples=resamples, seed=seed)

    def as_json(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Everything but the answers, as plain JSON."""
        measures = self.measures(resamples=resamples, seed=seed)
        return {
            "metric": self.name,
            "metrics": {name: measure.as_json() for name, measure in measures.items()},
            "counts": self.counts,
        }


@dataclass(frozen=True)
class Scores(Counted):
    """A scored file of any benchmark whose metrics are ratios of counts.

    Attributes:
        name: Name under which the numbers may be published, scorer variant included.
        table: Counts per image and the metrics on their sums.
        directions: Which way each metric is better; the first one is the headline.
        good: Count columns of which an image should have many: `mmlm compare` says which of two
            runs won an image by good minus bad.
        bad: Count columns of which an image should have few.
        samples: The scored answers, in the order of the file.
        official: What the official script prints, in its own rounding and under its own names.
        statuses: How many answers were not plainly scored, by reason: "unparsed", "not judged".
        details: Further numbers, plain JSON.
    """

    name: str
    table: CountTable = field(repr=False)
    directions: Mapping[str, Direction]
    good: tuple[str, ...]
    bad: tuple[str, ...] = ()
    samples: Sequence[Sample] = field(default=(), repr=False)
    official: Mapping[str, Any] = field(default_factory=dict)
    statuses: Mapping[str, int] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)

    def as_json(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Everything but the answers, as plain JSON."""
        record = super().as_json(resamples=resamples, seed=seed)
        for part in ("official", "statuses", "details"):
            if getattr(self, part):
                record[part] = dict(getattr(self, part))
        return record


def read_json(path: str | Path) -> Any:
    """Reads a JSON file, plain or gzipped.

    Raises:
        InputError: If it is missing, empty, not UTF-8 or no JSON; names file and reason.
    """
    return _parse(_read_text(path), f"{path}")


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """Reads records from JSON lines or from one JSON list, plain or gzipped.

    Raises:
        InputError: If the file is missing, empty, not UTF-8, or holds anything but JSON objects;
            names file, line and reason.
    """
    text = _read_text(path)
    if text.lstrip().startswith("["):
        places = [(f"{path}, entry {i}", entry) for i, entry in enumerate(_parse(text, str(path)))]
    else:
        lines = ((f"{path}, line {i}", line) for i, line in enumerate(text.split("\n"), start=1))
        places = [(place, _parse(line, place)) for place, line in lines if line.strip()]
    for place, entry in places:
        if not isinstance(entry, dict):
            raise InputError(
                f"{place}: expected a JSON object, found {type(entry).__name__}.",
                advice="Every record must look like {...} with named fields.",
            )
    if not places:
        raise InputError(f"{path} holds no records.", advice="Check that the run wrote anything.")
    return [entry for _, entry in places]


def _read_text(path: str | Path) -> str:
    try:
        raw = Path(path).read_bytes()
        text = (gzip.decompress(raw) if raw[:2] == b"\x1f\x8b" else raw).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{path} is not UTF-8 text (byte {error.start}).", advice="Convert it to UTF-8."
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise InputError(f"{path} cannot be read: {reason}.", advice="Check the path.") from error
    if not text.strip():
        raise InputError(f"{path} is empty.", advice="Check that the run wrote anything.")
    return text


def _parse(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise InputError(
            f"{place}: not valid JSON ({error.msg}, column {error.colno}).",
            advice="If the last line was cut by an interrupted run, finish that run first.",
        ) from error
    except RecursionError as error:
        raise InputError(f"{place}: nested too deeply.", advice="Check the file.") from error


def _plain(value: float) -> int | float:
    return int(value) if float(value).is_integer() else float(value)
