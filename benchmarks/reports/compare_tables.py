"""A comparison as tables for the terminal and as JSON."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.reports.comparison import p_text
from benchmarks.reports.rows import COLOURS, SIDE_BY_SIDE, line_table, side_by_side

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.reports.comparison import Comparison
    from benchmarks.reports.rows import Row

__all__ = ["as_json", "terminal"]

_MAIN = 6
"""So many metrics, the first ones, are shown of each run when there are many runs."""


def terminal(comparison: Comparison) -> list[Table]:
    """Tables for the terminal: the metrics, then the pictures."""
    labels = comparison.labels
    title = f"{comparison.name}: {comparison.pictures} pictures, changes against {labels[0]}"
    caption = (
        "Percent with 95 % bootstrap intervals over pictures; second {}: paired change against "
        f"{labels[0]}.\nGreen and red: the interval of the change excludes zero."
    )
    if len(labels) > SIDE_BY_SIDE:
        shown = {row.name: row.label for row in comparison.rows[:_MAIN]}
        caption = caption.format("numbers") + " Intervals are in the report."
        numbers = line_table(labels, comparison.rows, shown, title=title, caption=caption)
    else:
        caption = caption.format("lines")
        numbers = side_by_side(labels, comparison.rows, title=title, caption=caption)
    return [numbers, _pictures_table(comparison)]


def _pictures_table(comparison: Comparison) -> Table:
    from rich.table import Table
    from rich.text import Text

    several = len(comparison.outcomes) > 1
    table = Table(title="Picture by picture", title_justify="left")
    table.add_column(f"against {comparison.labels[0]}")
    for heading in ("Better on", "Worse on", "Same", "Sign test"):
        table.add_column(heading, justify="right")
    if several:
        table.add_column("Holm", justify="right")
    for outcome in comparison.outcomes:
        cells = [p_text(outcome.p_value), *([p_text(outcome.adjusted)] if several else [])]
        table.add_row(
            Text(outcome.label),
            Text(str(len(outcome.better)), COLOURS["better"]),
            Text(str(len(outcome.worse)), COLOURS["worse"]),
            str(outcome.same),
            *cells,
        )
    return table


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Everything as plain JSON."""
    return {
        "metric": comparison.name,
        "baseline": comparison.labels[0],
        "pictures": comparison.pictures,
        "resamples": comparison.resamples,
        "seed": comparison.seed,
        "metrics": {row.name: _row_json(comparison, row) for row in comparison.rows},
        "per_picture": {
            outcome.label: {
                "better": len(outcome.better),
                "worse": len(outcome.worse),
                "same": outcome.same,
                "sign_test_p": outcome.p_value,
                "holm_p": outcome.adjusted,
                "better_on": [str(image) for image in outcome.better],
                "worse_on": [str(image) for image in outcome.worse],
            }
            for outcome in comparison.outcomes
        },
    }


def _row_json(comparison: Comparison, row: Row) -> dict[str, Any]:
    runs: dict[str, Any] = {}
    for label, cell in zip(comparison.labels, row.cells, strict=True):
        runs[label] = cell.measure.as_json()
        if cell.change is not None:
            interval = cell.change.interval
            runs[label] |= {
                "change": cell.change.value,
                "change_interval": interval and [interval.low, interval.high],
                "verdict": cell.verdict or "undefined",
            }
    return {"direction": row.direction, "runs": runs}
