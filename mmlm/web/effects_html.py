"""An effects run as HTML: how far it is, curves that grow, changes with intervals, all numbers.

Changes and numbers are drawn by `benchmarks.reports.markup`, as in the reports that commands write;
`style` makes its style sheet fit the playground's light and dark pages.
"""

from __future__ import annotations

import html
import io
from collections.abc import Mapping, Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

from mmlm.pages import escaped

if TYPE_CHECKING:
    from benchmarks.base import Measure
    from benchmarks.reports.comparison import Comparison
    from benchmarks.run import Speed
    from mmlm.web.effects_run import Plan, Progress

__all__ = ["curve", "numbers", "progress", "style"]

CURVES = ("chair_s", "chair_i", "recall", "f1")
"""Metrics whose curves are drawn: two that should fall, two that should not."""

#: After Okabe and Ito: colour-blind people tell them apart, and each has a line style and a mark of
#: its own. The blue is a little lighter, to be read on dark pages too.
_LINES = (
    ("#767676", "solid"),
    ("#1f83c6", "dashed"),
    ("#d55e00", "dashdot"),
    ("#009e73", "dotted"),
    ("#cc79a7", (0, (6, 1, 1, 1, 1, 1))),
)
_MARKS = ("o", "s", "^", "D", "v")
_SIGNS = ("●", "■", "▲", "◆", "▼")
_INK = "#010203"
"""Stands for the page's text colour, whatever it is, until the figure is part of the page."""


def style() -> str:
    """The reports' style sheet with the playground's colours, for one component of the page."""
    from benchmarks.reports import markup

    own = resources.files("mmlm.web").joinpath("reports.css").read_text("utf-8")
    return markup.stylesheet("report.css", "compare.css") + own


def progress(step: Progress) -> str:
    """How far a run is, in words and as a bar."""
    pictures = step.latest.pictures if step.latest else 0
    if step.stopped:
        state = "Stopped"
    elif step.finished:
        state = "Done"
    else:
        state = "Running"
    text = f"{state}: {step.done} of {step.total} captions, {pictures} pictures in every way."
    if step.failed:
        text += f" {step.failed} pictures are left out: {step.reason}"
    return (
        f'<div class="run-progress" data-state="{state.lower()}">'
        f'<progress value="{step.done}" max="{step.total}" aria-label="captions"></progress>'
        f"<p>{escaped(text)}</p></div>"
    )


def numbers(step: Progress, plan: Plan) -> str:
    """Everything that is known so far; nothing before the first round.

    Args:
        step: The newest progress.
        plan: What is measured: its newest picture is shown.
    """
    if step.latest is None:
        return ""
    from benchmarks.reports import markup

    compared = step.latest
    changes = markup.forest(
        compared.labels,
        [row for row in compared.rows if row.direction != "none"],
        lambda row: row.label,
        compared.labels[0],
    )
    title = f"Change against {compared.labels[0]}, on the same pictures"
    return (
        f"<section><h2>As pictures come in</h2>{_curves(step.history)}</section>"
        f"<section><h2>The newest picture</h2>{_newest(compared, plan)}</section>"
        f"<section><h2>{escaped(title)}</h2>{changes}</section>"
        f"{_table(compared, step.speeds)}"
    )


def _newest(compared: Comparison, plan: Plan) -> str:
    """The last picture that all ways have described, with what they found and invented in it."""
    from benchmarks.reports import markup
    from mmlm import pages
    from mmlm.show.truth import draw_scene

    samples = {run.label: run.scored.samples[-1] for run in compared.runs}
    number = int(next(iter(samples.values())).image)
    drawn = draw_scene(plan.split, plan.seed, number)
    chips = " ".join(f'<span class="chip">{escaped(n)}</span>' for n in sorted(drawn.known.objects))
    captions = "".join(
        f'<div class="caption"><span class="tally">{escaped(sample.note)}</span>'
        f'<div class="who-name">{escaped(label)}</div>{markup.marked(sample.answer, sample.marks)}'
        "</div>"
        for label, sample in samples.items()
    )
    return (
        f'<article class="card"><div class="top">{pages.image(drawn.image, number)}'
        f'<p class="truth">Scene {number}: {chips}</p></div>{captions}</article>'
    )


def _curves(history: Sequence[Comparison]) -> str:
    key = "".join(
        f'<li><span style="color:{_LINES[number % len(_LINES)][0]}">'
        f"{_SIGNS[number % len(_SIGNS)]}</span> {escaped(label)}</li>"
        for number, label in enumerate(history[-1].labels)
    )
    figures = "".join(f"<figure>{curve(history, name)}</figure>" for name in CURVES)
    return (
        f'<ul class="key">{key}</ul><div class="panel curves">{figures}</div>'
        '<p class="note">Percent after so many pictures; bands are 95 % intervals.</p>'
    )


def curve(history: Sequence[Comparison], name: str) -> str:
    """One metric of every way against the number of pictures, as an SVG in the page's colours.

    Args:
        history: The comparisons after each round; at least one.
        name: The metric.
    """
    # Not pyplot: it keeps figures in a list that all threads share.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 2.6), layout="constrained")
    axes = figure.add_subplot()
    rows = [next(row for row in one.rows if row.name == name) for one in history]
    pictures = [one.pictures for one in history]
    for number in range(len(rows[0].cells)):
        _way(axes, number, pictures, [row.cells[number].measure for row in rows])
    axes.set_title(rows[0].label, color=_INK, fontsize=11, loc="left")
    axes.set_xlabel("pictures", color=_INK, fontsize=9)
    axes.set_xlim(0, max(pictures) * 1.04)
    axes.tick_params(colors=_INK, labelsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True)
    axes.grid(axis="y", color=_INK, alpha=0.12, linewidth=0.8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(_INK)
    return _as_svg(
        figure, f"{rows[0].label} after {pictures[-1]} pictures: {_words(history, name)}"
    )


def _way(axes: Any, number: int, pictures: Sequence[int], measures: Sequence[Measure]) -> None:
    """The line and the band of one way."""
    colour, dashes = _LINES[number % len(_LINES)]
    bands = [measure.interval for measure in measures]
    axes.plot(
        pictures,
        [_percent(measure.value) for measure in measures],
        color=colour,
        linestyle=dashes,
        marker=_MARKS[number % len(_MARKS)],
        markersize=4,
        linewidth=1.6,
    )
    axes.fill_between(
        pictures,
        [_percent(band and band.low) for band in bands],
        [_percent(band and band.high) for band in bands],
        color=colour,
        alpha=0.12,
        linewidth=0,
    )


def _as_svg(figure: Any, words: str) -> str:
    """A figure to be part of a page: no head, no background, the page's colour for text."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(_INK, "currentColor")
    return svg.replace("<svg ", f'<svg role="img" aria-label="{html.escape(words)}" ', 1)


def _words(history: Sequence[Comparison], name: str) -> str:
    """The newest values of a metric, for people who do not see the figure."""
    from benchmarks.tables import value_text

    latest = history[-1]
    row = next(row for row in latest.rows if row.name == name)
    values = zip(latest.labels, row.cells, strict=True)
    return ", ".join(f"{label} {value_text(name, cell.measure.value)}" for label, cell in values)


def _percent(value: float | None) -> float:
    """As matplotlib takes it: a gap where a metric is undefined."""
    return float("nan") if value is None else 100 * value


def _table(compared: Comparison, speeds: Mapping[str, Speed]) -> str:
    from benchmarks.reports import markup

    head = "".join(f"<th>{escaped(label)}</th>" for label in compared.labels)
    lines = markup.number_lines(compared.rows, len(compared.labels))
    times = "".join(_time(speeds[label]) for label in compared.labels)
    return (
        '<section><h2>All numbers</h2><p class="note">Percent with 95 % bootstrap intervals over '
        f"pictures and the counts behind them; below, the paired change against "
        f"{escaped(compared.labels[0])}. Scored as <code>{escaped(compared.name)}</code>, "
        f"{compared.pictures} pictures.</p>"
        f'<div class="panel scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{lines}<tr><th>Seconds per caption</th>{times}</tr></tbody></table></div>"
        "</section>"
    )


def _time(speed: Speed) -> str:
    seconds = speed.seconds_per_answer
    text = "-" if seconds is None else f"{seconds:.2f}"
    return f'<td><strong>{text}</strong><small class="counts">{speed.tokens} tokens</small></td>'
