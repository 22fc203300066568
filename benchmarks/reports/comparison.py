"""Runs of one benchmark against a baseline: paired differences, and who wins on which picture.

Everything here is a pure function of scored answers. Two views of the same runs are given, because
each hides what the other shows:

* Metrics: differences to the baseline with paired bootstrap intervals over pictures.
* Pictures: on how many a run is better, worse or the same, by the counts that the benchmark calls
  good and bad; with an exact sign test, and the pictures themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks import stats
from benchmarks.reports.rows import Row, make_row
from benchmarks.tables import label_of
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Hashable, Sequence

    import numpy as np

    from benchmarks.base import Sample, Scored

__all__ = [
    "Comparison",
    "Contender",
    "Outcome",
    "compare",
    "holm",
    "p_text",
    "samples_by_picture",
    "sign_test",
]


@dataclass(frozen=True)
class Contender:
    """A run that takes part.

    Attributes:
        label: Short name.
        scored: Its scores.
    """

    label: str
    scored: Scored = field(repr=False)


@dataclass(frozen=True)
class Outcome:
    """A run against the baseline, picture by picture.

    Attributes:
        label: The run.
        better: Pictures on which it is better, largest gain first.
        worse: Pictures on which it is worse, largest loss first.
        same: Number of pictures on which both are equally good.
        p_value: Two-sided exact sign test of better against worse.
        adjusted: The same after Holm's correction for the number of runs.
    """

    label: str
    better: tuple[Hashable, ...] = field(repr=False)
    worse: tuple[Hashable, ...] = field(repr=False)
    same: int
    p_value: float
    adjusted: float

    def __str__(self) -> str:
        """In words."""
        return (
            f"{self.label}: better on {len(self.better)} pictures, worse on {len(self.worse)}, "
            f"the same on {self.same} (sign test: {p_text(self.adjusted)})."
        )


@dataclass(frozen=True)
class Comparison:
    """Everything that can be said about the runs.

    Attributes:
        name: Name of the metrics, scorer variant included.
        runs: The baseline, then the others.
        rows: Every metric of every run, with paired changes.
        outcomes: One per run after the baseline.
        seed: Seed of the bootstrap.
        resamples: Resamples of the bootstrap.
    """

    name: str
    runs: tuple[Contender, ...]
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]
    resamples: int
    seed: int

    @property
    def labels(self) -> list[str]:
        """Names of the runs."""
        return [run.label for run in self.runs]

    @property
    def pictures(self) -> int:
        """Number of pictures."""
        return len(self.runs[0].scored.table.images)


def compare(
    runs: Sequence[Contender],
    *,
    metrics: Sequence[str] = (),
    resamples: int = stats.RESAMPLES,
    seed: int = 0,
) -> Comparison:
    """Compares runs with the first one.

    Args:
        runs: At least two, of one benchmark and on the same pictures.
        metrics: Which metrics to show. Default: all, the headline first.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Raises:
        ValueError: If there are fewer than two runs, or two of the same label.
        InputError: If the runs are scored in different ways or about different pictures, or a
            metric does not exist.
    """
    if len(runs) < 2 or len({run.label for run in runs}) < len(runs):
        raise ValueError("A comparison needs at least two runs, each with a label of its own.")
    first = runs[0].scored
    for run in runs[1:]:
        _check(runs[0], run)
    known = list(dict.fromkeys([*first.directions, *first.table.ratios]))
    if unknown := [name for name in metrics if name not in known]:
        raise InputError(
            f"{first.name} has no metric {unknown[0]!r}.",
            advice=f"Choose among {', '.join(known)}.",
        )
    tables = [run.scored.table for run in runs]
    rows = tuple(
        make_row(
            "",
            name,
            label_of(name),
            first.directions.get(name, "none"),
            tables,
            resamples=resamples,
            seed=seed,
        )
        for name in (metrics or known)
    )
    return Comparison(first.name, tuple(runs), rows, tuple(_outcomes(runs)), resamples, seed)


def _check(baseline: Contender, run: Contender) -> None:
    ours, theirs = baseline.scored, run.scored
    if ours.name != theirs.name:
        raise InputError(
            f"{baseline.label} is scored as {ours.name}, {run.label} as {theirs.name}: such "
            "numbers have no meaningful difference.",
            advice="Compare runs of one benchmark, and score them in one way (--variant).",
        )
    here, there = set(ours.table.images), set(theirs.table.images)
    if here != there:
        raise InputError(
            f"{baseline.label} is about {len(here)} pictures, {run.label} about {len(there)}: "
            f"{len(here - there)} stand in the first only, {len(there - here)} in the second only.",
            advice="Compare runs on the same pictures; finish or repeat the one that lacks some.",
        )
    if ours.table.columns != theirs.table.columns:
        raise InputError(
            f"{baseline.label} and {run.label} count different things: "
            f"{', '.join(sorted(set(ours.table.columns) ^ set(theirs.table.columns)))}.",
            advice="Compare runs with the same splits and the same scorer.",
        )


def _balance(scored: Scored) -> np.ndarray:
    """Good minus bad counts of every picture."""
    table = scored.table

    def total(names: Sequence[str]) -> np.ndarray:
        return table.counts[:, [table.columns.index(name) for name in names]].sum(axis=1)

    return total(scored.good) - total(scored.bad)


def _outcomes(runs: Sequence[Contender]) -> list[Outcome]:
    base = _balance(runs[0].scored)
    images = runs[0].scored.table.images
    found = []
    for run in runs[1:]:
        gains = (_balance(run.scored) - base).tolist()
        order = sorted(range(len(images)), key=lambda i: (-abs(gains[i]), i))
        better = tuple(images[i] for i in order if gains[i] > 0)
        worse = tuple(images[i] for i in order if gains[i] < 0)
        found.append((run.label, better, worse, sign_test(len(better), len(worse))))
    adjusted = holm([p for *_, p in found])
    return [
        Outcome(label, better, worse, len(images) - len(better) - len(worse), p, corrected)
        for (label, better, worse, p), corrected in zip(found, adjusted, strict=True)
    ]


def sign_test(wins: int, losses: int) -> float:
    """Two-sided exact p value of a fair coin giving a split at least as uneven as this.

    Ties say nothing about the direction of an effect and are left out. With neither wins nor
    losses there is no evidence of anything: 1.

    Args:
        wins: Pictures on which the run is better; >= 0.
        losses: Pictures on which it is worse; >= 0.

    Raises:
        ValueError: If a number is negative.
    """
    if min(wins, losses) < 0:
        raise ValueError(f"Wins and losses must not be negative; got {wins} and {losses}.")
    total, coefficient, tail = wins + losses, 1, 0
    for k in range(min(wins, losses) + 1):
        tail += coefficient
        coefficient = coefficient * (total - k) // (k + 1)
    # Whole numbers up to here: 2 ** total leaves the range of floats after 1,023 pictures.
    return min(1.0, 2 * tail / 2**total)


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down correction: keeps the chance of any false alarm among the tests.

    Paper: Holm, "A Simple Sequentially Rejective Multiple Test Procedure", Scandinavian Journal of
    Statistics 6 (1979). One p value stays as it is.

    Args:
        p_values: One per test, each in [0, 1].

    Returns:
        The adjusted p values, in the same order.
    """
    adjusted, highest = [0.0] * len(p_values), 0.0
    ascending = sorted(range(len(p_values)), key=lambda i: p_values[i])
    for rank, i in enumerate(ascending):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[i]))
        adjusted[i] = highest
    return adjusted


def p_text(p: float) -> str:
    """A p value as people write it: "p = 0.014", "p < 0.001"."""
    if p < 0.001:
        return "p < 0.001"
    return f"p = {p:.{2 if p >= 0.1 else 3}f}"


def samples_by_picture(scored: Scored) -> dict[Hashable, list[Sample]]:
    """The answers about each picture of the table, in the order of the file.

    A benchmark may count under a number, or under the name of a group of pictures, what its samples
    know under a file name; then the samples' units or ids decide. Answers that belong to no picture
    of the table are left out.
    """
    images = {str(image): image for image in scored.table.images}
    found: dict[Hashable, list[Sample]] = {image: [] for image in scored.table.images}
    for sample in scored.samples:
        key = next((key for key in (sample.unit, sample.image, sample.id) if key in images), None)
        if key is not None:
            found[images[key]].append(sample)
    return found
