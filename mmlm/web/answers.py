"""Answers as HTML: a card per column, invented objects marked, every word clickable.

Whatever comes from a model, a visitor or a file passes `escaped`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmlm.pages import escaped, prose
from mmlm.show.words import Piece, pieces, words

if TYPE_CHECKING:
    from mmlm.show.truth import Known
    from mmlm.web.columns import Column

__all__ = ["Clicked", "Turn", "failure_html", "talk_html", "truth_html"]

#: What a verdict is called, for what was named and for what was denied.
_VERDICTS = {"bad": ("invented", "wrongly denied"), "good": ("found", "rightly denied")}


@dataclass(frozen=True)
class Clicked:
    """A word of an answer that a visitor asked about.

    Attributes:
        column: Whose answer.
        start: Its first character.
        end: The character behind its last one.
    """

    column: int
    start: int
    end: int


@dataclass(eq=False)
class Turn:
    """One question of a visitor and its columns.

    Attributes:
        question: As it was asked.
        columns: The answers, filled while they come.
        model: Who answers.
        known: What is known about the picture, by column; empty if nothing is.
        clicked: The word in view.
        figures: HTML by column: where it looked at that word.
    """

    question: str
    columns: list[Column]
    model: str = ""
    known: dict[int, Known] = field(default_factory=dict)
    clicked: Clicked | None = None
    figures: dict[int, str] = field(default_factory=dict)


def talk_html(turns: Sequence[Turn], pending: str = "") -> str:
    """All turns of a talk, the newest first.

    Args:
        turns: In the order in which they were asked.
        pending: A question that waits for its turn.
    """
    numbered = list(enumerate(turns))
    waits = f'<p class="pending"><span class="caret"></span>{prose(pending)}</p>' if pending else ""
    return waits + "".join(_turn(number, turn) for number, turn in reversed(numbered))


def truth_html(known: Known | None, *, detector: str = "") -> str:
    """What is in the picture, as far as it is known.

    Args:
        known: None if nothing is.
        detector: The name of a detector that will look for what the answers name.
    """
    if known is None:
        how = (
            f"{escaped(detector)} looks for what the answers name."
            if detector
            else "What is in it is not known: no word can be marked as invented."
        )
        return f'<p class="truth">{how}</p>'
    chips = "".join(f'<span class="chip">{escaped(name)}</span>' for name in sorted(known.objects))
    return (
        f'<p class="truth"><span class="soft">In the picture</span> {chips or "no known object"}'
        f'<span class="soft source">known from {escaped(known.source)}</span></p>'
    )


def _turn(number: int, turn: Turn) -> str:
    columns = "".join(_column(turn, place) for place in range(len(turn.columns)))
    return (
        f'<section class="turn" data-turn="{number}">'
        f'<h3 class="asked"><span>{number + 1}</span>{prose(turn.question)}</h3>'
        f'<div class="columns">{columns}</div></section>'
    )


def _column(turn: Turn, place: int) -> str:
    column, known = turn.columns[place], turn.known.get(place)
    truth, asked = (known.objects, known.asked) if known else (None, None)
    cut = pieces(column.text, truth, asked)
    if column.error is not None:
        body = failure_html(column.error)
    else:
        clicked = turn.clicked if turn.clicked and turn.clicked.column == place else None
        caret = '<span class="caret"></span>' if column.state in ("waiting", "running") else ""
        body = f'<p class="answer">{_answer(column.text, cut, clicked)}{caret}</p>'
    return (
        f'<article class="column" data-column="{place}" data-state="{column.state}">'
        f"<header>{_title(column)}</header>{turn.figures.get(place, '')}{body}"
        f"<footer>{_tally(cut, known)}{_stats(column)}</footer></article>"
    )


def _title(column: Column) -> str:
    """The methods' names, and their parameters smaller."""
    parts = []
    for method in column.methods:
        name, bracket, rest = method.label.partition("(")
        text = f"({rest}" if bracket else ""
        shown = text if len(text) < 90 else f"{text[:80]}…)"
        parts.append(f'<b>{escaped(name)}</b><code title="{escaped(text)}">{escaped(shown)}</code>')
    return '<span class="plus">+</span>'.join(parts) or "<b>Plain model</b>"


def _stats(column: Column) -> str:
    if column.state in ("waiting", "failed"):
        return f'<span class="stats">{column.state}</span>'
    if not column.token_ids:
        return f'<span class="stats">{column.seconds:.1f} s</span>'
    n = len(column.token_ids)
    rate = n / column.seconds if column.seconds else 0
    stopped = " · stopped" if column.state == "stopped" else ""
    return (
        f'<span class="stats">{n} tokens · {column.seconds:.2f} s · '
        f"{rate:.0f} tok/s{stopped}</span>"
    )


def _tally(cut: Sequence[Piece], known: Known | None) -> str:
    """How many different objects were invented, found, and denied."""
    if known is None or not cut:
        return ""
    said = Counter(
        (kind, denied) for _, kind, denied in {(p.name, p.kind, p.denied) for p in cut if p.kind}
    )
    denials = any(denied for _, denied in said)
    parts = []
    for kind, (named, denied) in _VERDICTS.items():
        if said[kind, False] or not denials:
            parts.append(f'<span class="{kind}">{said[kind, False]} {named}</span>')
        if said[kind, True]:
            parts.append(f'<span class="{kind}">{said[kind, True]} {denied}</span>')
    return f'<span class="tally">{"".join(parts)}</span>'


def failure_html(error: Exception) -> str:
    """What went wrong, and what to do."""
    advice = getattr(error, "advice", "") or "Change the request and try again."
    return (
        f'<p class="failure">{escaped(str(error) or type(error).__name__)} '
        f"<em>{escaped(advice)}</em></p>"
    )


def _answer(text: str, cut: Sequence[Piece], clicked: Clicked | None) -> str:
    """The text with a place to click for every word; an object of several words is one place."""
    single = words(text)
    parts = []
    for piece in cut:
        if piece.kind:
            title = f"{piece.title} · click to see where the model looked"
            place = _place(piece.text, (piece.start, piece.end), clicked)
            parts.append(f'<mark class="{piece.kind}" title="{escaped(title)}">{place}</mark>')
            continue
        end = piece.start
        for span in _inside(single, piece):
            parts.append(_gap(text[end : span[0]]) + _place(text[slice(*span)], span, clicked))
            end = span[1]
        parts.append(_gap(text[end : piece.end]))
    return "".join(parts)


def _inside(spans: Sequence[tuple[int, int]], piece: Piece) -> list[tuple[int, int]]:
    cut = [(max(start, piece.start), min(end, piece.end)) for start, end in spans]
    return [(start, end) for start, end in cut if start < end]


def _place(text: str, span: tuple[int, int], clicked: Clicked | None) -> str:
    start, end = span
    chosen = clicked is not None and (clicked.start, clicked.end) == span
    return (
        f'<span class="word" role="button" tabindex="0" aria-pressed="{str(chosen).lower()}" '
        f'data-start="{start}" data-end="{end}">{escaped(text)}</span>'
    )


def _gap(text: str) -> str:
    """What stands between words: word-level models put a blank before punctuation."""
    return escaped(re.sub(r"\s+([.,?!:;])", r"\1", text))
