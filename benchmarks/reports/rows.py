"""Numbers of several runs side by side: values, paired changes against the first, verdicts.

The demo and `mmlm compare` show the same rows, so a change is called better or worse by one rule:
its paired 95 % interval excludes zero, and there are enough pictures for an interval to mean
anything.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from benchmarks import stats
from benchmarks.base import Direction, Measure
from benchmarks.tables import interval_text, value_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from rich.table import Table

    from benchmarks.base import CountTable

__all__ = [
    "ARROWS",
    "COLOURS",
    "FEWEST",
    "SIDE_BY_SIDE",
    "Cell",
    "Row",
    "Verdict",
    "change_text",
    "line_table",
    "make_row",
    "side_by_side",
]

Verdict = Literal["better", "worse", "within noise", "changed", "too few pictures", ""]

FEWEST = 10
"""A bootstrap over fewer pictures than this gives intervals that are far too narrow."""
SIDE_BY_SIDE = 5
"""More runs than this do not fit beside one another in a terminal."""
COLOURS = {"better": "green", "worse": "red", "changed": "yellow"}
ARROWS = {"lower": " ↓", "higher": " ↑", "none": ""}


@dataclass(frozen=True)
class Cell:
    """One number of one run.

    Attributes:
        measure: Value, counts, interval.
        change: Paired difference to the first run; None for the first run itself.
        verdict: What the change's interval allows to say.
    """

    measure: Measure
    change: stats.Difference | None
    verdict: Verdict


@dataclass(frozen=True)
class Row:
    """One metric of all runs, the baseline first.

    Attributes:
        group: Heading under which it stands; "" for none.
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


def make_row(
    group: str,
    name: str,
    label: str,
    direction: Direction,
    tables: Sequence[CountTable],
    *,
    resamples: int = stats.RESAMPLES,
    seed: int = 0,
) -> Row:
    """One metric of several runs on the same pictures, with paired changes against the first.

    Args:
        group: Heading under which the row stands.
        name: Name of the metric in the tables.
        label: What people read.
        direction: Which way is better.
        tables: One table per run, the baseline first.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.

    Raises:
        InputError: If the tables are about different pictures.
    """
    cells = []
    for number, table in enumerate(tables):
        measure = table.measure(name, resamples=resamples, seed=seed)
        change = None
        if number:
            change = tables[0].difference(table, name, resamples=resamples, seed=seed)
        cells.append(Cell(measure, change, _verdict(change, direction, len(table.images))))
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
    """A change with its interval, e.g. "-2.1 [-3.9, -0.4]"; empty for the baseline."""
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


def side_by_side(labels: Sequence[str], rows: Sequence[Row], *, title: str, caption: str) -> Table:
    """A table for the terminal: one column per run, one line per metric.

    Args:
        labels: Names of the runs.
        rows: Their numbers.
        title: Stands above the table.
        caption: Stands below it.
    """
    from rich.table import Table

    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for label in labels:
        table.add_column(escaped(label), justify="right")
    group = ""
    for row in rows:
        if group and row.group != group:
            table.add_section()
        group = row.group
        table.add_row(row.label + ARROWS[row.direction], *(_two_lines(row, c) for c in row.cells))
    return table


def _two_lines(row: Row, cell: Cell) -> str:
    value = value_text(row.name, cell.measure.value)
    text = f"[bold]{value}[/bold] [dim]{escaped(interval_text(row.name, cell.measure))}[/]"
    if cell.change is None:
        return text
    return text + f"\n[{COLOURS.get(cell.verdict, 'dim')}]{escaped(change_text(row, cell))}[/]"


def line_table(
    labels: Sequence[str],
    rows: Sequence[Row],
    shown: Mapping[str, str],
    *,
    title: str,
    caption: str,
    last: tuple[str, Sequence[str]] | None = None,
) -> Table:
    """A table for the terminal with one line per run: for many runs, and a few main metrics.

    Args:
        labels: Names of the runs.
        rows: Their numbers.
        shown: Names of the metrics to show, with their headings.
        title: Stands above the table.
        caption: Stands below it.
        last: Heading and texts of one more column.
    """
    from rich.table import Table

    told = {row.name: row for row in rows}
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    table.add_column("")
    for heading in (*shown.values(), *([last[0]] if last else [])):
        table.add_column(heading, justify="right")
    for number, label in enumerate(labels):
        cells = []
        for name in shown:
            row, cell = told[name], told[name].cells[number]
            text = f"[bold]{value_text(name, cell.measure.value)}[/bold]"
            if cell.change is not None:
                colour = COLOURS.get(cell.verdict, "dim")
                text += f" [{colour}]{change_text(row, cell, interval=False)}[/]"
            cells.append(text)
        table.add_row(escaped(label), *cells, *([last[1][number]] if last else []))
    return table


def escaped(text: str) -> str:
    """Text that rich does not read as markup."""
    return text.replace("[", r"\[")
