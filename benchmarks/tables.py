"""Results as tables for the terminal. Every ratio stands beside its counts and its interval."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from benchmarks.base import Ratio

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.base import CountTable, Measure, Scores
    from benchmarks.chair import ChairResult
    from benchmarks.pope import PopeSummary

__all__ = [
    "LABELS",
    "chair_table",
    "change_table",
    "interval_text",
    "label_of",
    "pope_table",
    "scores_table",
    "value_text",
]

LABELS = {
    "chair_s": "CHAIR_s",
    "chair_i": "CHAIR_i",
    "recall": "Recall",
    "precision": "Precision",
    "f1": "F1",
    "mean_length": "Mean length",
    "duplicate_sentence_share": "Duplicate sentences",
    "accuracy": "Accuracy",
    "yes_ratio": "Yes ratio",
    "unparsed": "Unparsed",
    "mean_accuracy": "Mean accuracy",
    "mean_f1": "Mean F1",
    "mean_yes_ratio": "Mean yes ratio",
}
LABELS |= {
    f"{kind}_{stage}": f"{title}, {stage} layers"
    for kind, title in (
        ("mdi", "MDI"),
        ("aei_text", "AEI of text"),
        ("aei_image", "AEI of image"),
        ("attention_text", "Attention on text"),
        ("attention_image", "Attention on image"),
    )
    for stage in ("early", "middle", "late")
}
# In words, tokens or swaps, not a share.
_PLAIN = ("mean_length", "text_tokens", "image_tokens", "swaps_per_question")
_SCALES = ("rating", "points")  # ends of names of scores on a scale of their own
_QUOTIENTS = ("mdi_", "aei_")  # how many times as much, not a share


def value_text(name: str, value: float | None) -> str:
    """A metric as papers print it: percent with one decimal; lengths as they are."""
    if value is None:
        return "undefined"
    if name.startswith(_QUOTIENTS) or name.endswith(_SCALES):
        return f"{value:.2f}"
    return f"{value if name.endswith(_PLAIN) else 100 * value:.1f}"


def interval_text(name: str, measure: Measure) -> str:
    """The 95 % interval of a metric, or nothing."""
    if measure.interval is None:
        return ""
    low, high = measure.interval.low, measure.interval.high
    return f"[{value_text(name, low)}, {value_text(name, high)}]"


def chair_table(result: ChairResult, *, seed: int = 0) -> Table:
    """All CHAIR metrics, and where in the captions objects are invented."""
    table = _table(f"{result.name}: {len(result.per_caption)} captions, {_pictures(result.table)}")
    for name, measure in result.measures(seed=seed).items():
        _row(table, LABELS[name], name, measure)
    table.add_section()
    for place, measure in zip(("first", "middle", "last"), result.by_third(), strict=True):
        _row(table, f"Invented, {place} third", "chair_i", measure)
    return table


def pope_table(summary: PopeSummary, *, seed: int = 0) -> Table:
    """Every split with all its metrics, then the means."""
    table = _table(f"POPE: {_pictures(summary.table)}")
    for split, result in summary.splits.items():
        for name, measure in result.measures(seed=seed).items():
            _row(table, f"{split}: {LABELS[name]}", name, measure)
        table.add_section()
    for name, measure in summary.means(seed=seed).items():
        _row(table, LABELS[name], name, measure, counts=False)
    for name, count in summary.statuses.items():
        table.add_row(f"Questions {name}", str(count))
    names = {result.name for result in summary.splits.values()}
    table.caption = ", ".join(sorted(names))
    if summary.llava_average is not None:
        table.caption += f"; LLaVA's POPE average: {100 * summary.llava_average:.1f}"
    return table


def scores_table(scores: Scores, *, seed: int = 0) -> Table:
    """All metrics of any other benchmark, what the official script prints, and what was counted."""
    table = _table(f"{scores.name}: {len(scores.samples)} answers, {_pictures(scores.table)}")
    for name, measure in scores.measures(seed=seed).items():
        # Of a mean of several ratios the sums above and below the lines give no quotient.
        counts = isinstance(scores.table.ratios[name], Ratio)
        _row(table, label_of(name), name, measure, counts=counts)
    for title, values in (("official", scores.official), ("count", scores.statuses)):
        if values:
            table.add_section()
        for name, value in _flat(values):
            table.add_row(f"{title}: {name}", "undefined" if value is None else f"{value}")
    return table


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Names and values of groups of values, one behind the other: "Attribute, F1"."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}, ")
        else:
            yield f"{prefix}{name}", value


def label_of(name: str) -> str:
    """What people read for a metric: its known label, or its name with blanks."""
    words = name.replace("_", " ")
    return LABELS.get(name, words.capitalize() if name.islower() else words)  # aAcc stays aAcc


def change_table(before: CountTable, after: CountTable, *, seed: int = 0) -> Table:
    """Paired differences on the same pictures, with what their intervals allow to say."""
    from rich.table import Table

    table = Table("Metric", "Before", "After", "Change", "95 %", "", title="Paired change")
    for name in before.ratios:
        change = before.difference(after, name, seed=seed)
        if change.value is None or change.interval is None:
            cells = ("undefined", "", "")
        else:
            low, high = (value_text(name, x) for x in (change.interval.low, change.interval.high))
            verdict = "clear" if change.is_clear else "within noise"
            cells = (f"{_signed(name, change.value)}", f"[{low}, {high}]", verdict)
        old, new = (value_text(name, t.measure(name).value) for t in (before, after))
        table.add_row(label_of(name), old, new, *cells)
    return table


def _signed(name: str, value: float) -> str:
    return ("+" if value > 0 else "") + value_text(name, value)


def _table(title: str) -> Table:
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    table.add_column("Metric")
    for column in ("Value", "95 % interval", "Counts"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _row(table: Table, label: str, name: str, measure: Measure, *, counts: bool = True) -> None:
    fraction = f"{measure.numerator:g} / {measure.denominator:g}" if counts else ""
    table.add_row(label, value_text(name, measure.value), interval_text(name, measure), fraction)


def _pictures(table: CountTable) -> str:
    return f"{len(table.images)} picture{'s' if len(table.images) != 1 else ''}"
