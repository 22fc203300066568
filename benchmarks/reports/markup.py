"""Parts of the HTML reports that show scores: marked answers, paired changes, tables of metrics.

`page` (the demo) and `compare_page` put their pages together from these and from `mmlm.pages`.
Whatever comes from a model or a file passes `escaped`; what these functions return is HTML.
"""

from __future__ import annotations

import html
import re
from importlib import resources
from typing import TYPE_CHECKING

from benchmarks.reports.rows import Row, Verdict, change_text
from benchmarks.tables import interval_text, value_text
from mmlm import pages
from mmlm.pages import escaped, prose

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from benchmarks.base import Mark
    from benchmarks.reports.rows import Cell

__all__ = ["forest", "marked", "minus", "number_lines", "stylesheet", "tone"]


def stylesheet(*names: str) -> str:
    """The style of all pages with style files that ship with the benchmarks."""
    data = resources.files("benchmarks").joinpath("data")
    return pages.stylesheet(*(data.joinpath(name).read_text("utf-8") for name in names))


def minus(text: str) -> str:
    """Escaped text with typographic minus signs."""
    return re.sub(r"-(?=\d)", "−", html.escape(text))


def marked(text: str, marks: Iterable[Mark]) -> str:
    """An answer with the parts marked that its scorer found right or wrong.

    Args:
        text: The answer.
        marks: In order of their places. A mark that begins inside the one before is left out.
    """
    pieces, end = [], 0
    for mark in marks:
        if mark.start < end:
            continue
        title = f' title="{escaped(mark.title)}"' if mark.title else ""
        pieces.append(prose(text[end : mark.start]))
        pieces.append(
            f'<mark class="{mark.kind}"{title}>{escaped(text[mark.start : mark.end])}</mark>'
        )
        end = mark.end
    pieces.append(prose(text[end:]))
    return "".join(pieces)


def tone(verdict: Verdict) -> str:
    """Class of the style file that colours what has this verdict."""
    return verdict if verdict in ("better", "worse", "changed") else "noise"


# --- numbers --------------------------------------------------------------------------------------


def forest(
    labels: Sequence[str], rows: Sequence[Row], name: Callable[[Row], str], baseline: str
) -> str:
    """Paired changes as points with intervals; to the right is always better.

    Args:
        labels: Names of the runs.
        rows: Metrics with a better side; those without any interval are left out.
        name: What stands beside a metric.
        baseline: Name of the first run, in a sentence.
    """
    rows = [r for r in rows if any(cell.change and cell.change.interval for cell in r.cells)]
    ends = [
        abs(end)
        for row in rows
        for cell in row.cells
        if cell.change is not None and cell.change.interval is not None
        for end in (cell.change.interval.low, cell.change.interval.high)
    ]
    if not ends:
        return ""
    scale = _nice(100 * max(ends)) / 100
    metrics = "".join(_forest_metric(labels, row, scale, name(row)) for row in rows)
    axis = (
        '<div class="metric axis"><span></span><div class="track-row"><span></span>'
        f"<div><span>← worse</span><span>{escaped(baseline)}</span><span>better →</span></div>"
        "<span></span></div></div>"
    )
    return (
        '<p class="note">Points are paired changes, lines their 95 % intervals. A line that '
        'crosses the middle is <span class="noise">within noise</span>; '
        '<span class="better">green</span> is better, <span class="worse">red</span> worse. '
        f"The scale ends at {100 * scale:g} points.</p>"
        f'<div class="panel forest">{metrics}{axis}</div>'
    )


def _forest_metric(labels: Sequence[str], row: Row, scale: float, name: str) -> str:
    sign = -1 if row.direction == "lower" else 1
    tracks = []
    for label, cell in zip(labels, row.cells, strict=True):
        if cell.change is None:
            continue
        mark = ""
        if cell.change.value is not None and cell.change.interval is not None:
            low, high = sorted(
                sign * end for end in (cell.change.interval.low, cell.change.interval.high)
            )
            left, right, point = (
                50 + 50 * x / scale for x in (low, high, sign * cell.change.value)
            )
            mark = (
                f'<i style="left:{left:.2f}%;width:{max(right - left, 0.3):.2f}%"></i>'
                f'<b style="left:{point:.2f}%"></b>'
            )
        colour = tone(cell.verdict)
        tracks.append(
            f'<div class="track-row"><span class="who">{escaped(label)}</span>'
            f'<div class="track {colour}">{mark}</div>'
            f'<span class="number {colour}">{minus(change_text(row, cell))}</span></div>'
        )
    return f'<div class="metric"><span>{escaped(name)}</span><div>{"".join(tracks)}</div></div>'


def _nice(value: float) -> float:
    """The next round number that is not smaller."""
    return next(
        (step for step in (1, 2, 3, 5, 8, 10, 15, 20, 25, 30, 40, 60) if step >= value), 100
    )


def number_lines(rows: Sequence[Row], runs: int) -> str:
    """Lines of a table: a metric each, with a heading before every group."""
    body, group = [], ""
    for row in rows:
        if row.group != group:
            group = row.group
            body.append(f'<tr class="group"><th colspan="{runs + 1}">{escaped(group)}</th></tr>')
        cells = "".join(_number(row, cell) for cell in row.cells)
        body.append(f"<tr><th>{escaped(row.label)}</th>{cells}</tr>")
    return "".join(body)


def _number(row: Row, cell: Cell) -> str:
    measure = cell.measure
    counts = f"{measure.numerator:g} / {measure.denominator:g}"
    if row.name.startswith("mean_") and row.name != "mean_length":
        counts = ""  # a mean of ratios has no single fraction
    change = change_text(row, cell)
    if cell.verdict:
        change += f" {cell.verdict}"
    return (
        f"<td><strong>{value_text(row.name, measure.value)}</strong>"
        f'<small class="interval">{escaped(interval_text(row.name, measure))}</small>'
        f'<small class="counts">{counts}</small>'
        f'<small class="{tone(cell.verdict)}">{minus(change)}</small></td>'
    )
