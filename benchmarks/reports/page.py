"""The report as one HTML file: no network, no scripts, light and dark, readable on a phone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.reports import markup
from benchmarks.reports.markup import minus as _minus
from benchmarks.reports.markup import tone as _tone
from benchmarks.reports.report import MethodRun, conclusions, relative_time
from benchmarks.reports.rows import Row
from benchmarks.tables import value_text
from mmlm import pages
from mmlm.pages import escaped as _text

if TYPE_CHECKING:
    from PIL import Image

    from benchmarks.chair import CaptionScore

__all__ = ["GENERATOR", "Page", "gallery_of", "render"]

GENERATOR = "mmlm demo"
"""Stands in the file's head, so that a report is told apart from somebody else's file."""

_IN_FOREST = ("chair_s", "chair_i", "recall", "accuracy", "mean_f1")


@dataclass(frozen=True)
class Page:
    """What the report shows.

    Attributes:
        runs: Plain decoding, then the methods.
        rows: Their numbers, from `benchmarks.reports.report.compare`.
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
    n_captions = len(page.runs[0].chair.per_caption)
    n_answers = sum(result.counts["answers"] for result in page.runs[0].pope.splits.values())
    captions = f"{n_captions:,} captions and {n_answers:,} yes/no answers per way of decoding"
    body = [
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
        pages.footer(page.facts),
    ]
    style = markup.stylesheet("report.css")
    return pages.document(GENERATOR, "What the model sees that is not there", style, body)


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
    """Paired changes of the main metrics."""
    plot = markup.forest(
        [run.label for run in page.runs],
        [row for row in page.rows if row.name in _IN_FOREST],
        _forest_label,
        "plain",
    )
    title = "Change against plain decoding, on the same pictures"
    return f"<section><h2>{title}</h2>{plot}</section>" if plot else ""


def _forest_label(row: Row) -> str:
    if row.group == "Captions":
        return row.label
    return f"POPE {row.label[0].lower()}{row.label[1:]}"


def _numbers(page: Page) -> str:
    head = "".join(f"<th>{_text(run.label)}</th>" for run in page.runs)
    times = []
    for run in page.runs:
        ratio = relative_time(run, page.runs[0])
        seconds = run.speed.seconds_per_answer
        shown = "not timed" if ratio is None else f"<strong>{ratio:.2f}</strong>"
        if seconds is not None:
            shown += f'<small class="interval">{1000 * seconds:.0f} ms per caption</small>'
        times.append(f"<td>{shown}</td>")
    body = (
        f"{markup.number_lines(page.rows, len(page.runs))}"
        f'<tr class="group"><th colspan="{len(page.runs) + 1}">Cost</th></tr>'
        f"<tr><th>Time per caption, plain = 1</th>{''.join(times)}</tr>"
    )
    chair, *_ = page.runs
    metrics = [chair.chair.name, *sorted({r.name for r in chair.pope.splits.values()})]
    return (
        "<section><h2>All numbers</h2>"
        '<p class="note">Percent with 95 % bootstrap intervals over pictures and the counts behind '
        "them; below, the paired change against plain decoding. "
        f"Scored as {', '.join(f'<code>{_text(name)}</code>' for name in metrics)}.</p>"
        f'<div class="panel scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div></section>"
    )


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
        f"{pages.image(page.picture(first.image_id), first.image_id)}"
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
    return markup.marked(caption.caption, caption.marks())
