"""The page of `mmlm compare`: differences, and the answers behind them beside their pictures.

A gallery that only shows where a method helps is an advertisement. So the pictures with the largest
gains stand beside those with the largest losses, and the first pictures as they come beside both.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from benchmarks.reports import markup
from benchmarks.reports.comparison import p_text, samples_by_picture
from benchmarks.reports.markup import minus
from benchmarks.reports.rows import change_text
from mmlm import pages
from mmlm.pages import escaped

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence

    from PIL import Image

    from benchmarks.base import Sample
    from benchmarks.reports.comparison import Comparison, Outcome

__all__ = ["GENERATOR", "Page", "render"]

GENERATOR = "mmlm compare"
"""Stands in the file's head, so that a report is told apart from somebody else's file."""

_QUESTIONS = 4  # shown of one picture; POPE alone asks eighteen about each

Gallery = tuple[str, str, list["Hashable"], list[str]]
"""Title, note, pictures and labels of the runs shown."""


@dataclass(frozen=True)
class Page:
    """What the page shows.

    Attributes:
        comparison: The numbers.
        notes: What apart from the method tells the runs apart.
        facts: Name and value of what a reader needs to repeat this.
        picture: Gives the picture of a file name, None if it cannot be had.
    """

    comparison: Comparison
    notes: Sequence[str]
    facts: Mapping[str, str]
    picture: Callable[[str], Image.Image | None] = field(repr=False)


def render(page: Page, *, per_group: int = 6) -> str:
    """The whole HTML file.

    Args:
        page: What to show.
        per_group: Pictures in each part of the gallery.
    """
    comparison = page.comparison
    baseline, *others = comparison.labels
    title = f"{others[0] if len(others) == 1 else f'{len(others)} runs'} against {baseline}"
    answers = len(comparison.runs[0].scored.samples)
    counts = f"{comparison.pictures:,} pictures, {answers:,} answers per run"
    cards = _Cards(page)
    body = [
        "<header>",
        f'<p class="eyebrow">{escaped(comparison.name)} · {counts}</p>',
        f"<h1>{escaped(title)}</h1>",
        _findings(comparison),
        _notes(page.notes),
        "</header><main>",
        _forest(comparison),
        *(cards.gallery(*part) for part in _galleries(comparison, per_group)),
        _numbers(comparison),
        _lists(comparison, cards),
        "</main>",
        pages.footer(page.facts),
    ]
    style = markup.stylesheet("report.css", "compare.css")
    return pages.document(GENERATOR, title, style, body)


def _findings(comparison: Comparison) -> str:
    headline = comparison.rows[0]
    several = len(comparison.outcomes) > 1
    items = []
    for number, outcome in enumerate(comparison.outcomes, start=1):
        cell = headline.cells[number]
        p = p_text(outcome.adjusted) + (" after Holm's correction" if several else "")
        items.append(
            f'<li class="panel finding {markup.tone(cell.verdict)}">'
            f"<strong>{escaped(outcome.label)}</strong>"
            f"<p>{escaped(headline.label)} {minus(change_text(headline, cell))}"
            f"{f': {cell.verdict}' if cell.verdict else ''}.</p>{_also(comparison, number)}"
            f'<p class="details">Better on {len(outcome.better)} pictures, worse on '
            f"{len(outcome.worse)}, the same on {outcome.same}.<br>"
            f"Sign test: {escaped(p)}.</p></li>"
        )
    return f'<ul class="findings">{"".join(items)}</ul>'


def _also(comparison: Comparison, number: int) -> str:
    """Metrics other than the headline whose change is clear."""
    clear = {"better": [], "worse": []}
    for row in comparison.rows[1:]:
        cell = row.cells[number]
        if cell.verdict in clear:
            clear[cell.verdict].append(f"{escaped(row.label)} {minus(change_text(row, cell))}")
    return "".join(
        f'<p class="details">Also {verdict}: {"; ".join(found)}.</p>'
        for verdict, found in clear.items()
        if found
    )


def _notes(notes: Sequence[str]) -> str:
    if not notes:
        return ""
    return f'<ul class="notes">{"".join(f"<li>{escaped(note)}</li>" for note in notes)}</ul>'


def _forest(comparison: Comparison) -> str:
    plot = markup.forest(
        comparison.labels,
        # Lengths are no percentages and have no better side.
        [row for row in comparison.rows if row.direction != "none"],
        lambda row: row.label,
        comparison.labels[0],
    )
    title = f"Change against {escaped(comparison.labels[0])}, on the same pictures"
    return f"<section><h2>{title}</h2>{plot}</section>" if plot else ""


def _numbers(comparison: Comparison) -> str:
    head = "".join(f"<th>{escaped(label)}</th>" for label in comparison.labels)
    lines = markup.number_lines(comparison.rows, len(comparison.labels))
    several = " Intervals are not corrected for the number of runs or metrics."
    return (
        "<section><h2>All numbers</h2>"
        '<p class="note">Percent with 95 % bootstrap intervals over pictures and the counts behind '
        f"them; below, the paired change against {escaped(comparison.labels[0])}.{several} Scored "
        f"as <code>{escaped(comparison.name)}</code>.</p>"
        f'<div class="panel scroll"><table><thead><tr><th></th>{head}</tr></thead>'
        f"<tbody>{lines}</tbody></table></div></section>"
    )


def _galleries(comparison: Comparison, per_group: int) -> Iterator[Gallery]:
    baseline = comparison.labels[0]
    for outcome in comparison.outcomes:
        for word, way, images in (
            ("better", "gains", outcome.better),
            ("worse", "losses", outcome.worse),
        ):
            if images:
                yield (
                    f"Where {outcome.label} is {word} than {baseline}",
                    f"Chosen: the largest {way}, {min(per_group, len(images))} of {len(images)}.",
                    list(images[:per_group]),
                    [baseline, outcome.label],
                )
    first = list(comparison.runs[0].scored.table.images[:per_group])
    note = "Not chosen: the beginning of the data set."
    yield "The first pictures, as they come", note, first, comparison.labels


def _lists(comparison: Comparison, cards: _Cards) -> str:
    parts = [
        f"<details><summary>{escaped(outcome.label)} is {word} on {len(images)}</summary>"
        f"<p>{', '.join(escaped(cards.name(image)) for image in images)}</p></details>"
        for outcome in comparison.outcomes
        for word, images in _both_ways(outcome)
        if images
    ]
    return (
        "<section><h2>Which pictures changed</h2>"
        '<p class="note">By good minus bad counts of a picture; the largest change first.</p>'
        f"{''.join(parts) or '<p>None.</p>'}</section>"
    )


def _both_ways(outcome: Outcome) -> tuple[tuple[str, Sequence[Hashable]], ...]:
    return ("better", outcome.better), ("worse", outcome.worse)


class _Cards:
    """Pictures with the answers of several runs below them.

    Args:
        page: What the page shows.
    """

    def __init__(self, page: Page) -> None:
        self._page = page
        self._samples = {run.label: samples_by_picture(run.scored) for run in page.comparison.runs}
        asked = {sample.question for sample in page.comparison.runs[0].scored.samples}
        self._question = asked.pop() if len(asked) == 1 else ""

    def name(self, image: Hashable) -> str:
        """What people know a picture by: its file name, where that is known."""
        samples = next(iter(self._samples.values()))[image]
        return samples[0].image if samples and samples[0].image else str(image)

    def gallery(
        self, title: str, note: str, images: Sequence[Hashable], labels: Sequence[str]
    ) -> str:
        """One part of the gallery."""
        cards = "".join(self._card(image, labels) for image in images)
        if self._question:
            note += f" Asked: “{self._question}”"
        return (
            f'<section class="gallery-part"><h2>{escaped(title)}</h2>'
            f'<p class="note">{escaped(note)} <mark class="bad">wrong or invented</mark> '
            f'<mark class="good">right</mark></p><div class="gallery">{cards}</div></section>'
        )

    def _card(self, image: Hashable, labels: Sequence[str]) -> str:
        samples = {label: self._samples[label][image] for label in labels}
        tables = {label: {one.id: one for one in ones} for label, ones in samples.items()}
        first = samples[labels[0]]
        shown = _telling(first, [tables[label] for label in labels[1:]])
        body = []
        for sample in shown:
            if sample.question and not self._question:
                body.append(f'<p class="question">{escaped(sample.question)}</p>')
            body += [
                _answer(label, tables[label][sample.id])
                for label in labels
                if sample.id in tables[label]
            ]
        if rest := len(first) - len(shown):
            body.append(f'<p class="more note">and {rest} more about this picture</p>')
        name = self.name(image)
        return (
            f'<article class="card"><div class="top">{self._picture(name)}'
            f'<p class="name"><strong>{escaped(name)}</strong></p></div>{"".join(body)}</article>'
        )

    def _picture(self, name: str) -> str:
        picture = self._page.picture(name)
        if picture is None:
            return '<div class="absent">picture not found</div>'
        return pages.image(picture, name)


def _telling(first: Sequence[Sample], others: Sequence[Mapping[str, Sample]]) -> list[Sample]:
    """The few answers about a picture that say most: first those that are right in one run only."""

    def rank(sample: Sample) -> int:
        twins = [other[sample.id] for other in others if sample.id in other]
        if any(twin.correct != sample.correct for twin in twins):
            return 0
        return 1 if any(twin.answer != sample.answer for twin in twins) else 2

    return sorted(first, key=rank)[:_QUESTIONS]


def _answer(label: str, sample: Sample) -> str:
    kind = {True: " right", False: " wrong", None: ""}[sample.correct]
    return (
        f'<div class="caption"><span class="tally{kind}">{escaped(sample.note)}</span>'
        f'<span class="who-name">{escaped(label)}</span>'
        f"<p>{markup.marked(sample.answer, sample.marks) or '(no words)'}</p></div>"
    )
