"""Accuracies of stored answers, all together and by subject; the same for every benchmark here."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

from benchmarks.base import CountTable, Ratio, Sample, Scores
from benchmarks.stored import check_ids
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence

__all__ = ["Extra", "Reading", "Scored", "answered_lines", "score_lines"]


@dataclass(frozen=True, slots=True)
class Reading:
    """What a scorer made of one answer.

    Attributes:
        said: The answer as it was read: a letter, a word, a text.
        correct: Whether it counts as right.
        status: Why it was not plainly read; "" if it was.
    """

    said: str
    correct: bool
    status: str = ""


Scored: TypeAlias = "tuple[Mapping[str, Any], Reading]"


@dataclass(frozen=True)
class Extra:
    """Further metrics of a benchmark.

    Attributes:
        ratios: The metrics.
        columns: The counts they need.
        counts: Those counts by line id; a line that is not there has none.
    """

    ratios: Mapping[str, Ratio]
    columns: tuple[str, ...]
    counts: Callable[[Sequence[Scored]], dict[str, dict[str, int]]]


def answered_lines(
    benchmark: str, lines: Sequence[Mapping[str, Any]], needed: Sequence[str] = ()
) -> tuple[list[Mapping[str, Any]], int]:
    """Checks stored lines and leaves out those that hold an error.

    Args:
        benchmark: The benchmark they must belong to.
        lines: The lines.
        needed: Text fields a line must have, besides id and text.

    Returns:
        The lines with an answer, and the number of the others.

    Raises:
        InputError: If a field is missing or no text, an id occurs twice, a line belongs to another
            benchmark, or no answer is left.
    """
    check_ids(lines)
    answered = []
    for number, line in enumerate(lines, start=1):
        if line.get("benchmark") != benchmark:
            raise InputError(
                f"Line {number} is of {line.get('benchmark')!r}, not of {benchmark!r}.",
                advice=f"Score files of `mmlm bench {benchmark}`.",
            )
        fields = needed if line.get("error") else (*needed, "text")
        if wrong := [name for name in fields if not isinstance(line.get(name), str)]:
            raise InputError(
                f"Line {number} has {line.get(wrong[0])!r} in {wrong[0]!r} instead of a text.",
                advice="Score the file as it was written, or repeat the run.",
            )
        if not line.get("error"):
            answered.append(line)
    if not answered:
        raise InputError(f"None of {len(lines)} lines holds an answer.", advice="Repeat the run.")
    return answered, len(lines) - len(answered)


def score_lines(
    benchmark: str,
    variant: str,
    lines: Sequence[Mapping[str, Any]],
    read: Callable[[Mapping[str, Any]], Reading],
    *,
    macro: bool,
    sizes: Mapping[str, int],
    official: Callable[[Sequence[Scored]], dict[str, Any]],
    extra: Extra | None = None,
) -> Scores:
    """Accuracies of the answers, all together and by subject.

    Args:
        benchmark: Name of the benchmark.
        variant: How answers are read, for the name.
        lines: The stored lines.
        read: Reads one line with an answer and a label.
        macro: Whether the mean over the subjects is the headline.
        sizes: Number of questions of each official split.
        official: What the official scorer prints, from the lines and their readings.
        extra: Counts and ratios besides.

    Raises:
        InputError: See `answered_lines`; also if lines of several splits are mixed.
    """
    answered, failed = answered_lines(benchmark, lines, ("split", "subject", "image"))
    splits = {line["split"] for line in answered}
    if len(splits) > 1:
        raise InputError(
            f"The lines are of several splits: {', '.join(sorted(splits))}.",
            advice="Score each split by itself.",
        )
    split = splits.pop()
    known = [line for line in answered if line.get("label") is not None]
    scored = [(line, read(line)) for line in known]
    statuses = Counter(reading.status for _, reading in scored if reading.status)
    statuses["failed"] = failed
    statuses["label is secret"] = len(answered) - len(known)
    statuses[f"not asked, of {sizes.get(split, 0)}"] = max(0, sizes.get(split, 0) - len(lines))
    ratios, rows = _counts(answered, {line["id"]: reading for line, reading in scored}, macro)
    if extra is not None:
        ratios |= extra.ratios
        blank, found = dict.fromkeys(extra.columns, 0), extra.counts(scored)
        ids = [line["id"] for line in answered]
        rows = [row | found.get(name, blank) for name, row in zip(ids, rows, strict=True)]
    return Scores(
        name=f"{benchmark}/{split}/{variant}",
        table=CountTable.build([_unit(line) for line in answered], rows, ratios),
        directions=dict.fromkeys(ratios, "higher"),
        good=("right",),
        bad=("wrong",),
        samples=[_sample(line, reading) for line, reading in scored],
        official=official(scored),
        statuses={name: count for name, count in statuses.items() if count},
    )


def _counts(
    lines: Sequence[Mapping[str, Any]], readings: Mapping[str, Reading], macro: bool
) -> tuple[dict[str, Any], list[dict[str, int]]]:
    """The ratios, and the counts of each line; a line without a label counts nothing."""
    subjects = sorted({line["subject"] for line in lines})
    whole = Ratio(("right",), ("questions",))
    parts = {name: Ratio(("right",), ("questions",)).prefixed(name) for name in subjects}
    mean = {"mean_accuracy": tuple(parts.values())} if macro else {}
    ratios = {**mean, "accuracy": whole, **(parts if len(parts) > 1 else {})}
    rows = []
    for line in lines:
        reading = readings.get(line["id"])
        asked, right = int(reading is not None), int(reading is not None and reading.correct)
        row = {"questions": asked, "right": right, "wrong": asked - right}
        for name in subjects:
            own = name == line["subject"]
            row |= {f"{name}.questions": asked * own, f"{name}.right": right * own}
        rows.append(row)
    return ratios, rows


def _unit(line: Mapping[str, Any]) -> Hashable:
    """What is drawn together: questions that show the same first picture."""
    return line["image"] or line["id"]


def _sample(line: Mapping[str, Any], reading: Reading) -> Sample:
    label = line["label"]
    expected = " or ".join(label) if isinstance(label, list) else label
    said = f"read {reading.said}" if reading.said else "nothing found"
    note = f"expected {expected}, {reading.status or said}"
    return Sample(
        line["id"], line["image"], line.get("question", ""), line["text"], reading.correct, note
    )
