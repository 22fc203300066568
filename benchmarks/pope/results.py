"""POPE's numbers: one split, and several splits with their means."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import stats
from benchmarks.base import Counted, CountTable, Direction, Measure, Sample
from benchmarks.pope.parsers import PARSERS
from benchmarks.pope.questions import KINDS

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["PopeResult", "PopeSummary", "summarize"]

_DIRECTIONS: dict[str, Direction] = {
    "accuracy": "higher",
    "f1": "higher",
    "precision": "higher",
    "recall": "higher",
    "yes_ratio": "none",
    "unparsed": "lower",
}
_MEANS = ("accuracy", "f1", "yes_ratio")
_GOOD = ("tp", "tn")
_BAD = ("fp", "fn", "neither_yes", "neither_no")


@dataclass(frozen=True)
class PopeResult(Counted):
    """Scores of the answers to one question file.

    Attributes:
        parser: Name of the parser.
        version: Version of the question file, "custom" if it is none of the published.
        predictions: Per answer True (yes), False (no), None (neither).
        table: Counts per picture.
        chat: Whether the questions about a picture were one conversation.
        samples: The answers one by one.
    """

    parser: str
    version: str
    predictions: tuple[bool | None, ...] = field(repr=False)
    table: CountTable = field(repr=False)
    chat: bool = False
    samples: tuple[Sample, ...] = field(default=(), repr=False)

    @property
    def name(self) -> str:
        """Name under which the numbers may be published."""
        return _name({self.version}, self.chat, self.parser)

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Which way each metric is better."""
        return _DIRECTIONS

    @property
    def good(self) -> tuple[str, ...]:
        """Right answers."""
        return _GOOD

    @property
    def bad(self) -> tuple[str, ...]:
        """Wrong answers, and those that are neither yes nor no."""
        return _BAD

    @property
    def counts(self) -> dict[str, int | float]:
        """tp, fp, tn, fn, answers that are neither (by label), answers, yes labels."""
        return self.table.sums()


@dataclass(frozen=True)
class PopeSummary:
    """Scores of several splits and their means.

    Attributes:
        splits: Result of each split.
        table: Counts of all splits side by side per picture, so that a mean over splits has an
            interval; metrics are ``mean_accuracy``, ``mean_f1`` and ``mean_yes_ratio``, and the
            same of every split, e.g. ``random_f1``.
        statuses: How many questions were not scored: ``failed`` (the line holds an error),
            ``missing`` (a question of a published file that has no line).
    """

    splits: Mapping[str, PopeResult]
    table: CountTable = field(repr=False)
    statuses: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name under which the means may be published."""
        results = self.splits.values()
        versions = {result.version for result in results}
        first = next(iter(results))
        return _name(versions, first.chat, first.parser)

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Which way each metric of the table is better."""
        metrics = [metric for _ in ("mean", *self.splits) for metric in _MEANS]
        return {
            name: _DIRECTIONS[metric]
            for name, metric in zip(self.table.ratios, metrics, strict=True)
        }

    @property
    def good(self) -> tuple[str, ...]:
        """Right answers of every split."""
        return self._columns(_GOOD)

    @property
    def bad(self) -> tuple[str, ...]:
        """Wrong answers of every split, and those that are neither yes nor no."""
        return self._columns(_BAD)

    def _columns(self, names: Sequence[str]) -> tuple[str, ...]:
        return tuple(f"{split}.{name}" for split in self.splits for name in names)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The answers one by one, split by split."""
        return tuple(sample for result in self.splits.values() for sample in result.samples)

    @property
    def metrics(self) -> dict[str, float | None]:
        """The means over the splits; None if one of them is undefined."""
        return {name: self.table.measure(name).value for name in self._mean_names}

    @property
    def _mean_names(self) -> list[str]:
        return [f"mean_{metric}" for metric in _MEANS]

    def means(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Measure]:
        """The means over the splits, with intervals over pictures."""
        return {
            name: self.table.measure(name, resamples=resamples, seed=seed)
            for name in self._mean_names
        }

    @property
    def llava_average(self) -> float | None:
        """LLaVA's single "POPE" number: mean F1, official parser, the three legacy files.

        None for any other combination, for which the number would not be comparable.
        """
        comparable = set(self.splits) == set(KINDS) and all(
            (result.version, result.parser, result.chat) == ("coco-legacy", "official", False)
            for result in self.splits.values()
        )
        return self.metrics["mean_f1"] if comparable and not self.statuses else None

    def as_json(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """All splits and means as plain JSON."""
        means = self.means(resamples=resamples, seed=seed)
        record: dict[str, Any] = {
            "metric": self.name,
            "splits": {
                name: result.as_json(resamples=resamples, seed=seed)
                for name, result in self.splits.items()
            },
            "means": {name: measure.as_json() for name, measure in means.items()},
        }
        if self.llava_average is not None:
            record["llava_average"] = self.llava_average
        if self.statuses:
            record["statuses"] = dict(self.statuses)
        return record


def summarize(splits: Mapping[str, PopeResult]) -> PopeSummary:
    """Puts the results of several splits side by side and adds their means.

    Raises:
        ValueError: If there is no split, or the parsers differ, or only some are conversations.
    """
    if len({(result.parser, result.chat) for result in splits.values()}) != 1:
        raise ValueError("A summary needs at least one split, and one parser for all of them.")
    rule = PARSERS[next(iter(splits.values())).parser]
    tables = {name: result.table for name, result in splits.items()}
    images = sorted({image for table in tables.values() for image in table.images}, key=str)
    columns = [f"{split}.{name}" for split, table in tables.items() for name in table.columns]
    counts = np.zeros((len(images), len(columns)))
    row = {image: i for i, image in enumerate(images)}
    start = 0
    for table in tables.values():
        rows = [row[image] for image in table.images]
        counts[rows, start : start + len(table.columns)] = table.counts
        start += len(table.columns)
    ratios: dict[str, Any] = {
        f"mean_{metric}": tuple(rule.metrics[metric].prefixed(split) for split in tables)
        for metric in _MEANS
    }
    ratios |= {
        f"{split}_{metric}": rule.metrics[metric].prefixed(split)
        for split in tables
        for metric in _MEANS
    }
    return PopeSummary(dict(splits), CountTable(tuple(columns), tuple(images), counts, ratios))


def _name(versions: set[str], chat: bool, parser: str) -> str:
    form = "/chat" if chat else ""
    return f"pope/{'+'.join(sorted(versions))}{form}/{parser}"
