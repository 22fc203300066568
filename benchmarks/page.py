"""The report as one HTML file: no network, no scripts, light and dark, readable on a phone."""

from __future__ import annotations

import base64
import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import resources
from typing import TYPE_CHECKING

from benchmarks.report import (
    MethodRun,
    Row,
    Verdict,
    change_text,
    conclusions,
    relative_time,
)
from benchmarks.tables import interval_text, value_text

if TYPE_CHECKING:
    from PIL import Image

    from benchmarks.chair import CaptionScore

__all__ = ["GENERATOR", "Page", "gallery_of", "render"]

GENERATOR = "mmlm demo"
"""Stands in the file's head, so that a report is told apart from somebody else's file."""

SMALL = 128  # pixels; pictures up to this size are enlarged without smoothing
THUMBNAIL = 320
_IN_FOREST = ("chair_s", "chair_i", "recall", "accuracy", "mean_f1")


@dataclass(frozen=True)
class Page:
    """What the report shows.

    Attributes:
        runs: Plain decoding, then the methods.
        rows: Their numbers, from `benchmarks.report.compare`.
        source: What the pictures are.
        picture: Gives the picture of an image id.
        facts: Name and value of what a reader needs to repeat the run.
    """

    runs: Sequence[MethodRun]
    rows: Sequence[Row]
    source: str
    picture: Callable[[int], Image.Image] = field(repr=False)
    facts: Mapping[str, str]


def render(page: Page, *, per_group: int = 6) -> str:
    """The whole HTML file.

    Args:
        page: What to show.
        per_group: Pictures in each part of the gallery.
    """
    style = resources.files("benchmarks").joinpath("data", "report.css").read_text("utf-8")
    n_captions = len(page.runs[0].chair.per_caption)
    n_answers = sum(result.counts["answers"] for result in page.runs[0].pope.splits.values())
    captions = f"{n_captions:,} captions and {n_answers:,} yes/no answers per way of decoding"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<meta name="generator" content="{GENERATOR}">',
        "<title>What the model sees that is not there</title>",
        f"<style>{style}</style></head><body>",
        "<header>",
        f'<p class="eyebrow">{_text(page.source)} · {_text(captions)}</p>',
        "<h1>What the model sees that is not there</h1>",
        _findings(page),
        "</header><main>",
        _forest(page),
        *(
            _gallery(page, title, note, images)
            for title, note, images in gallery_of(page.runs, per_group)
        ),
        _numbers(page),
        _thirds(page),
        "</main>",
        _footer(page),
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


# --- numbers --------------------------------------------------------------------------------------


def _findings(page: Page) -> str:
    plain = page.runs[0].chair
    shares = {name: plain.metrics[name] for name in ("chair_s", "chair_i")}
    items = [
        '<li class="panel finding"><strong>Plain decoding</strong><p>'
        f"{value_text('chair_s', shares['chair_s'])} % of the captions name something that is not "
        f"there; {value_text('chair_i', shares['chair_i'])} % of all named objects are invented."
        "</p></li>"
    ]
    for told in conclusions(page.runs, page.rows):
        items.append(
            f'<li class="panel finding {_tone(told.verdict)}"><strong>{_text(told.label)}</strong>'
            f"<p>{_text(told.effect[0].upper() + told.effect[1:])}.</p>"
            f'<p class="details">{_minus(told.details).replace("; ", "<br>")}</p></li>'
        )
    return f'<ul class="findings">{"".join(items)}</ul>'


def _forest(page: Page) -> str:
    """Paired changes as points with intervals; to the right is always better."""
    rows = [
        row
        for row in page.rows
        if row.name in _IN_FOREST
        and any(cell.change and cell.change.interval for cell in row.cells)
    ]
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
    metrics = "".join(_forest_metric(page, row, scale) for row in rows)
    axis = (
        '<div class="metric axis"><span></span><div class="track-row"><span></span>'
        "<div><span>← worse</span><span>plain</span><span>better →</span></div>"
        "<span></span></div></div>"
    )
    return (
        "<section><h2>Change against plain decoding, on the same pictures</h2>"
        '<p class="note">Points are paired changes, lines their 95 % intervals. A line that '
        'crosses the middle is <span class="noise">within noise</span>; '
        '<span class="better">green</span> is better, <span class="worse">red</span> worse. '
        f"The scale ends at {100 * scale:g} points.</p>"
        f'<div class="panel forest">{metrics}{axis}</div></section>'
    )


def _forest_metric(page: Page, row: Row, scale: float) -> str:
    sign = -1 if row.direction == "lower" else 1
    tracks = []
    for run, cell in zip(page.runs, row.cells, strict=True):
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
        tone = _tone(cell.verdict)
        tracks.append(
            f'<div class="track-row"><span class="who">{_text(run.label)}</span>'
            f'<div class="track {tone}">{mark}</div>'
            f'<span class="number {tone}">{_minus(change_text(row, cell))}</span></div>'
        )
    label = row.label if row.group == "Captions" else f"POPE {row.label[0].lower()}{row.label[1:]}"
    return f'<div class="metric"><span>{_text(label)}</span><div>{"".join(tracks)}</div></div>'


def _nice(value: float) -> float:
    """The next round number that is not smaller."""
    return next(
        (step for step in (1, 2, 3, 5, 8, 10, 15, 20, 25, 30, 40, 60) if step >= value), 100
    )


def _numbers(page: Page) -> str:
    head = "".join(f"<th>{_text(run.label)}</th>" for run in page.runs)
    body, group = [], ""
    for row in page.rows:
        if row.group != group:
            group = row.group
            body.append(f'<tr class="group"><th colspan="{len(page.runs) + 1}">{group}</th></tr>')
        body.append(f"<tr><th>{_text(row.label)}</th>{''.join(_cells(row))}</tr>")
    times = []
    for run in page.runs:
        ratio = relative_time(run, page.runs[0])
        seconds = run.speed.seconds_per_answer
        shown = "not timed" if ratio is None else f"<strong>{ratio:.2f}</strong>"
        if seconds is not None:
            shown += f'<small class="interval">{1000 * seconds:.0f} ms per caption</small>'
        times.append(f"<td>{shown}</td>")
    body.append(f'<tr class="group"><th colspan="{len(page.runs) + 1}">Cost</th></tr>')
    body.append(f"<tr><th>Time per caption, plain = 1</th>{''.join(times)}</tr>")
    chair, *_ = page.runs
    metrics = [chair.chair.name, *sorted({r.name for r in chair.pope.splits.values()})]
    return (
        "<section><h2>All numbers</h2>"
        '<p class="note">Percent with 95 % bootstrap intervals over pictures and the counts behind '
        "them; below, the paired change against plain decoding. "
        f"Scored as {', '.join(f'<code>{_text(name)}</code>' for name in metrics)}.</p>"
        f'<div class="panel scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></section>"
    )


def _cells(row: Row) -> list[str]:
    cells = []
    for cell in row.cells:
        measure = cell.measure
        counts = f"{measure.numerator:g} / {measure.denominator:g}"
        if row.name.startswith("mean_") and row.name != "mean_length":
            counts = ""  # a mean of ratios has no single fraction
        change = change_text(row, cell)
        if cell.verdict:
            change += f" {cell.verdict}"
        cells.append(
            f"<td><strong>{value_text(row.name, measure.value)}</strong>"
            f'<small class="interval">{_text(interval_text(row.name, measure))}</small>'
            f'<small class="counts">{counts}</small>'
            f'<small class="{_tone(cell.verdict)}">{_minus(change)}</small></td>'
        )
    return cells


def _thirds(page: Page) -> str:
    rows = []
    for run in page.runs:
        cells = "".join(
            f"<td><strong>{value_text('chair_i', measure.value)}</strong>"
            f'<small class="counts">{measure.numerator:g} / {measure.denominator:g}</small></td>'
            for measure in run.chair.by_third()
        )
        rows.append(f"<tr><th>{_text(run.label)}</th>{cells}</tr>")
    return (
        "<section><h2>Where in a caption objects are invented</h2>"
        '<p class="note">Share of invented mentions, in percent, in the first, middle and last '
        "third of the sentences.</p>"
        '<div class="panel scroll"><table><thead><tr><th></th><th>first</th><th>middle</th>'
        f"<th>last</th></tr></thead><tbody>{''.join(rows)}</tbody></table></div></section>"
    )


def _footer(page: Page) -> str:
    facts = "".join(
        f"<dt>{_text(name)}</dt><dd><code>{_text(value)}</code></dd>"
        for name, value in page.facts.items()
    )
    return f"<footer><h2>How this was made</h2><dl>{facts}</dl></footer>"


def _tone(verdict: Verdict) -> str:
    return verdict if verdict in ("better", "worse", "changed") else "noise"


# --- pictures -------------------------------------------------------------------------------------


def gallery_of(runs: Sequence[MethodRun], per_group: int) -> list[tuple[str, str, list[int]]]:
    """Which pictures the gallery shows: title, note and positions for each part.

    Two parts are chosen for what they show, in both directions, and say so; the last one is the
    beginning of the data set as it comes.
    """
    changes = [
        sum(len(run.chair.per_caption[i].hallucinated) for run in runs[1:])
        - (len(runs) - 1) * len(runs[0].chair.per_caption[i].hallucinated)
        for i in range(len(runs[0].chair.per_caption))
    ]
    order = sorted(range(len(changes)), key=lambda i: (changes[i], i))
    fewer = [i for i in order if changes[i] < 0][:per_group]
    more = [i for i in reversed(order) if changes[i] > 0][:per_group]
    parts = [
        (
            "Where the methods invent less",
            "Chosen: the pictures with the largest decrease.",
            fewer,
        ),
        (
            "Where the methods invent more",
            "Chosen: the pictures with the largest increase.",
            more,
        ),
        (
            "The first pictures, as they come",
            "Not chosen: the beginning of the data set.",
            list(range(min(per_group, len(changes)))),
        ),
    ]
    return [part for part in parts if part[2]]


def _gallery(page: Page, title: str, note: str, positions: Sequence[int]) -> str:
    cards = "".join(_card(page, position) for position in positions)
    return (
        f'<section class="gallery-part"><h2>{title}</h2>'
        f'<p class="note">{note} <mark class="bad">invented</mark> '
        f'<mark class="good">in the picture</mark></p><div class="gallery">{cards}</div></section>'
    )


def _card(page: Page, position: int) -> str:
    first = page.runs[0].chair.per_caption[position]
    chips = "".join(f'<span class="chip">{_text(name)}</span>' for name in sorted(first.truth))
    captions = "".join(_caption(run.label, run.chair.per_caption[position]) for run in page.runs)
    return (
        f'<article class="card"><div class="top">'
        f"{_image(page.picture(first.image_id), first.image_id)}"
        f'<p class="truth">In the picture<br>{chips or "none of the 80 objects"}</p></div>'
        f"{captions}</article>"
    )


def _caption(label: str, caption: CaptionScore) -> str:
    found = set(caption.objects) & caption.truth
    invented = len(caption.hallucinated)
    missed = ", ".join(sorted(caption.truth - found))
    tally = f"{len(found)} found, {invented} invented"
    return (
        f'<div class="caption"><span class="tally">{tally}</span>'
        f'<span class="who-name">{_text(label)}</span><p>{_marked(caption)}</p>'
        + (f'<p class="missed">not named: {_text(missed)}</p>' if missed else "")
        + "</div>"
    )


def _marked(caption: CaptionScore) -> str:
    """The caption with every named object marked."""
    text = caption.caption
    # Lower-casing can change the length of exotic letters; the spans belong to the lower case.
    if len(text.lower()) != len(text):
        text = text.lower()
    pieces, end = [], 0
    for start, stop, mention in caption.spans():
        pieces.append(_prose(text[end:start]))
        wrong = mention.node not in caption.truth
        kind, what = ("bad", "invented") if wrong else ("good", "in the picture")
        pieces.append(
            f'<mark class="{kind}" title="{_text(mention.node)}: {what}">'
            f"{_text(text[start:stop])}</mark>"
        )
        end = stop
    pieces.append(_prose(text[end:]))
    return "".join(pieces)


def _prose(text: str) -> str:
    """Escaped text; word-level models put a blank before punctuation, people do not."""
    return _text(re.sub(r"\s+([.,?!:;])", r"\1", text))


def _image(picture: Image.Image, image_id: int) -> str:
    small = max(picture.size) <= SMALL
    picture = picture.convert("RGB")
    kind = "PNG" if small else "JPEG"
    if not small:
        picture.thumbnail((2 * THUMBNAIL, 2 * THUMBNAIL))
    buffer = io.BytesIO()
    picture.save(buffer, kind, **({"optimize": True} if small else {"quality": 82}))
    data = base64.b64encode(buffer.getvalue()).decode()
    css = ' class="small"' if small else ""
    return (
        f'<img{css} src="data:image/{kind.lower()};base64,{data}" alt="picture {image_id}" '
        f'width="{picture.width}" height="{picture.height}">'
    )


def _text(text: str) -> str:
    return html.escape(text)


def _minus(text: str) -> str:
    """Escaped text with typographic minus signs."""
    return re.sub(r"-(?=\d)", "−", html.escape(text))
