"""The demo's report: plain decoding and methods side by side, in numbers and in pictures.

`compare` turns scored answers into rows of numbers with intervals and paired changes; `terminal`
shows them as one table, `benchmarks.page` as one HTML file without network or scripts.
A change is called better or worse only if its paired 95 % interval excludes zero.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import chair as chair_module
from benchmarks import stats
from benchmarks.tables import interval_text, value_text

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from rich.table import Table

    from benchmarks.base import CountTable, Measure
    from benchmarks.chair import ChairResult
    from benchmarks.pope import PopeSummary
    from benchmarks.run import Speed

__all__ = [
    "Cell",
    "Conclusion",
    "MethodRun",
    "Row",
    "as_json",
    "change_text",
    "compare",
    "conclusions",
    "relative_time",
    "terminal",
]

Direction = Literal["lower", "higher", "none"]
Verdict = Literal["better", "worse", "within noise", "changed", "too few pictures", ""]

FEWEST = 10
"""A bootstrap over fewer pictures than this gives intervals that are far too narrow."""


@dataclass(frozen=True)
class MethodRun:
    """What one way of decoding gave.

    Attributes:
        label: Short name, as the user wrote it; "plain" for no method.
        text: The method's full text form, empty for plain decoding.
        chair: Scored captions.
        pope: Scored yes/no answers.
        speed: How long the captions took.
    """

    label: str
    text: str
    chair: ChairResult = field(repr=False)
    pope: PopeSummary = field(repr=False)
    speed: Speed


@dataclass(frozen=True)
class Cell:
    """One number of one run.

    Attributes:
        measure: Value, counts, interval.
        change: Paired difference to plain decoding; None for plain itself.
        verdict: What the change's interval allows to say.
    """

    measure: Measure
    change: stats.Difference | None
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    """One metric of all runs, plain first.

    Attributes:
        group: "Captions" or "Questions".
        name: Name of the metric in its table.
        label: What people read.
        direction: Which way is better.
        cells: One per run.
    """

    group: str
    name: str
    label: str
    direction: Direction
    cells: tuple[Cell, ...]


_CHAIR: tuple[tuple[str, str, Direction], ...] = (
    ("chair_s", "CHAIR_s: captions that invent", "lower"),
    ("chair_i", "CHAIR_i: invented mentions", "lower"),
    ("recall", "Recall: true objects named", "higher"),
    ("f1", "F1 of named objects", "higher"),
    ("mean_length", "Words per caption", "none"),
    ("duplicate_sentence_share", "Repeated sentences", "lower"),
)


def compare(
    runs: Sequence[MethodRun],
    themes: Mapping[int, Collection[str]] | None = None,
    *,
    seed: int = 0,
) -> list[Row]:
    """All numbers of all runs, with paired changes against the first.

    Args:
        runs: Plain decoding, then the methods, on the same pictures.
        themes: Objects that belong to each picture's scene, if known.
        seed: Seed of the bootstrap.
    """
    rows = [
        _row("Captions", name, label, direction, [run.chair.table for run in runs], seed)
        for name, label, direction in _CHAIR
    ]
    if themes:
        tables = [chair_module.theme_share(run.chair, themes) for run in runs]
        label = "Invented objects that fit the scene"
        rows.append(_row("Captions", "theme_share", label, "none", tables, seed))
    for split in runs[0].pope.splits:
        tables = [run.pope.splits[split].table for run in runs]
        label = f"Accuracy, {split}"
        rows.append(_row("Questions", "accuracy", label, "higher", tables, seed))
    tables = [run.pope.table for run in runs]
    rows.append(_row("Questions", "mean_f1", "Mean F1", "higher", tables, seed))
    rows.append(_row("Questions", "mean_yes_ratio", "Answers that are yes", "none", tables, seed))
    return rows


def _row(
    group: str,
    name: str,
    label: str,
    direction: Direction,
    tables: Sequence[CountTable],
    seed: int,
) -> Row:
    cells = []
    for number, table in enumerate(tables):
        measure = table.measure(name, resamples=stats.RESAMPLES, seed=seed)
        change = tables[0].difference(table, name, seed=seed) if number else None
        verdict = _verdict(change, direction, len(table.images))
        cells.append(Cell(measure, change, verdict))
    return Row(group, name, label, direction, tuple(cells))


def _verdict(change: stats.Difference | None, direction: Direction, pictures: int) -> Verdict:
    if change is None or change.value is None:
        return ""
    if pictures < FEWEST:
        return "too few pictures"
    if not change.is_clear:
        return "within noise"
    if direction == "none":
        return "changed"
    return "better" if (change.value < 0) == (direction == "lower") else "worse"


def change_text(row: Row, cell: Cell, *, interval: bool = True) -> str:
    """A change with its interval, e.g. "-2.1 [-3.9, -0.4]"; empty for plain decoding."""
    if cell.change is None:
        return ""
    if cell.change.value is None or cell.change.interval is None:
        return "undefined"
    text = _signed(row.name, cell.change.value)
    if not interval:
        return text
    ends = (cell.change.interval.low, cell.change.interval.high)
    return f"{text} [{', '.join(_signed(row.name, end) for end in ends)}]"


def _signed(name: str, value: float) -> str:
    text = value_text(name, value)
    return "0.0" if text in ("-0.0", "0.0") else text if text.startswith("-") else f"+{text}"


def relative_time(run: MethodRun, plain: MethodRun) -> float | None:
    """Time per caption, as a multiple of plain decoding; None if either was not timed."""
    own, base = run.speed.seconds_per_answer, plain.speed.seconds_per_answer
    return own / base if own is not None and base else None


@dataclass(frozen=True)
class Conclusion:
    """What the captions allow to say about one method.

    Attributes:
        label: The method.
        effect: In words.
        details: The changes it rests on.
        verdict: The effect on invention.
    """

    label: str
    effect: str
    details: str
    verdict: Verdict

    def __str__(self) -> str:
        """One sentence."""
        return f"{self.label} {self.effect} ({self.details})."


def conclusions(runs: Sequence[MethodRun], rows: Sequence[Row]) -> list[Conclusion]:
    """One honest sentence per method."""
    told = {row.name: row for row in rows}
    shown = {"chair_i": "CHAIR_i", "chair_s": "CHAIR_s", "recall": "recall", "mean_f1": "POPE F1"}
    results = []
    for index, run in enumerate(runs[1:], start=1):
        cells = {name: told[name].cells[index] for name in shown}
        details = "; ".join(f"{shown[n]} {change_text(told[n], cell)}" for n, cell in cells.items())
        verdicts = {cells["chair_i"].verdict, cells["chair_s"].verdict}
        verdict: Verdict = "within noise"
        effect = "shows no clear effect on invention here"
        if "better" in verdicts and "worse" not in verdicts:
            verdict, effect = "better", "invents less than plain decoding"
            if cells["recall"].verdict == "worse":
                effect += ", but also names fewer true objects"
        elif "worse" in verdicts and "better" not in verdicts:
            verdict, effect = "worse", "invents more than plain decoding: it does not help here"
        elif "too few pictures" in verdicts:
            effect = "was tried on too few pictures to tell"
        if (answers := cells["mean_f1"].verdict) in ("better", "worse"):
            effect += f"; its yes/no answers are {answers}"
        results.append(Conclusion(run.label, effect, details, verdict))
    return results


def terminal(runs: Sequence[MethodRun], rows: Sequence[Row], title: str) -> Table:
    """All numbers as one table for the terminal; of many runs the main ones, a line each."""
    from rich.table import Table

    if len(runs) > _SIDE_BY_SIDE:
        return _line_by_line(runs, rows, title)
    colours = _COLOURS
    arrows = {"lower": " ↓", "higher": " ↑", "none": ""}
    table = Table(title=title, title_justify="left", caption=_CAPTION, caption_justify="left")
    table.add_column("")
    for run in runs:
        table.add_column(run.label, justify="right")
    group = ""
    for row in rows:
        if group and row.group != group:
            table.add_section()
        group = row.group
        cells = []
        for cell in row.cells:
            value = value_text(row.name, cell.measure.value)
            text = f"[bold]{value}[/bold] [dim]{_escaped(interval_text(row.name, cell.measure))}[/]"
            if cell.change is not None:
                colour = colours.get(cell.verdict, "dim")
                text += f"\n[{colour}]{_escaped(change_text(row, cell))}[/]"
            cells.append(text)
        table.add_row(row.label + arrows[row.direction], *cells)
    table.add_section()
    times = [relative_time(run, runs[0]) for run in runs]
    table.add_row(
        "Time per caption, plain = 1", *("-" if t is None else f"[bold]{t:.2f}[/]" for t in times)
    )
    return table


def _line_by_line(runs: Sequence[MethodRun], rows: Sequence[Row], title: str) -> Table:
    """The main numbers with their changes, one line per run."""
    from rich.table import Table

    shown = {
        "chair_s": "CHAIR_s ↓",
        "chair_i": "CHAIR_i ↓",
        "recall": "Recall ↑",
        "mean_length": "Words",
        "duplicate_sentence_share": "Repeated ↓",
        "mean_f1": "POPE F1 ↑",
    }
    told = {row.name: row for row in rows}
    caption = f"{_CAPTION.replace('second lines', 'second numbers')} Intervals are in the report."
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for heading in (*shown.values(), "Time"):
        table.add_column(heading, justify="right")
    for number, run in enumerate(runs):
        cells = []
        for name in shown:
            row, cell = told[name], told[name].cells[number]
            text = f"[bold]{value_text(name, cell.measure.value)}[/bold]"
            if cell.change is not None:
                colour = _COLOURS.get(cell.verdict, "dim")
                text += f" [{colour}]{change_text(row, cell, interval=False)}[/]"
            cells.append(text)
        time = relative_time(run, runs[0])
        table.add_row(run.label, *cells, "-" if time is None else f"{time:.2f}")
    return table


_SIDE_BY_SIDE = 5
"""More runs than this do not fit beside one another."""
_COLOURS = {"better": "green", "worse": "red", "changed": "yellow"}
_CAPTION = (
    "Percent with 95 % bootstrap intervals over pictures; second lines: paired change against "
    "plain.\nGreen and red: the interval of the change excludes zero."
)


def _escaped(text: str) -> str:
    return text.replace("[", r"\[")


def as_json(runs: Sequence[MethodRun], rows: Sequence[Row]) -> dict[str, Any]:
    """All numbers as plain JSON."""
    return {
        "runs": [
            {
                "label": run.label,
                "method": run.text,
                "chair": run.chair.as_json(),
                "pope": run.pope.as_json(),
                "seconds_per_caption": run.speed.seconds_per_answer,
                "time_relative_to_plain": relative_time(run, runs[0]),
            }
            for run in runs
        ],
        "changes": [
            {
                "metric": row.label,
                "direction": row.direction,
                "runs": {
                    run.label: {
                        "value": cell.measure.value,
                        "change": cell.change.value,
                        "interval": cell.change.interval
                        and [cell.change.interval.low, cell.change.interval.high],
                        "verdict": cell.verdict,
                    }
                    for run, cell in zip(runs, row.cells, strict=True)
                    if cell.change is not None
                },
            }
            for row in rows
        ],
        "conclusions": [str(conclusion) for conclusion in conclusions(runs, rows)],
    }
