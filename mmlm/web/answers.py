"""Answers as HTML: a card per column, invented objects marked, every word clickable."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mmlm.pages import escaped
from mmlm.show.words import Piece, pieces, words

if TYPE_CHECKING:
    from mmlm.show.truth import Known
    from mmlm.web.columns import Column

__all__ = ["Turn", "talk_html", "truth_html"]

_KINDS = {"bad": "invented", "good": "in the picture"}


@dataclass
class Turn:
    """One question of a visitor and its columns.

    Attributes:
        question: As it was asked.
        columns: The answers, filled while they come.
        known: What is known about the picture, by column; empty if nothing is.
    """

    question: str
    columns: list[Column]
    known: dict[int, Known] = field(default_factory=dict)


def talk_html(turns: Sequence[Turn]) -> str:
    """All turns of a talk, the newest first.

    Args:
        turns: In the order in which they were asked.
    """
    numbered = list(enumerate(turns))
    return "".join(_turn(number, turn) for number, turn in reversed(numbered))


def truth_html(known: Known | None) -> str:
    """What is in the picture, as far as it is known."""
    if known is None:
        return (
            '<p class="truth">What is in this picture is not known, so no word can be marked '
            "as invented.</p>"
        )
    chips = "".join(f'<span class="chip">{escaped(name)}</span>' for name in sorted(known.objects))
    return (
        f'<p class="truth"><b>In the picture:</b> {chips or "nothing of the 80 categories"}</p>'
        f'<p class="source">from {escaped(known.source)}</p>'
    )


def _turn(number: int, turn: Turn) -> str:
    columns = "".join(
        _column(place, column, turn.known.get(place)) for place, column in enumerate(turn.columns)
    )
    return (
        f'<section class="turn" data-turn="{number}">'
        f'<h3 class="asked"><span>{number + 1}</span>{escaped(turn.question)}</h3>'
        f'<div class="columns" style="--n: {len(turn.columns)}">{columns}</div></section>'
    )


def _column(place: int, column: Column, known: Known | None) -> str:
    truth, asked = (known.objects, known.asked) if known else (None, None)
    cut = pieces(column.text, truth, asked)
    if column.error is not None:
        body = _failure(column.error)
    else:
        caret = '<span class="caret"></span>' if column.state == "running" else ""
        body = f'<p class="answer">{_prose(column.text, cut)}{caret}</p>'
    return (
        f'<article class="column" data-column="{place}" data-state="{column.state}">'
        f"<header>{_title(column)}</header>{body}"
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
    if not column.n_tokens:
        return f'<span class="stats">{column.seconds:.1f} s</span>'
    rate = column.n_tokens / column.seconds if column.seconds else 0
    stopped = " · stopped" if column.state == "stopped" else ""
    return (
        f'<span class="stats">{column.n_tokens} tokens · {column.seconds:.2f} s · '
        f"{rate:.0f} tokens/s{stopped}</span>"
    )


def _tally(cut: Sequence[Piece], known: Known | None) -> str:
    """How many different objects were invented and found."""
    if known is None:
        return ""
    counts = {
        kind: len({piece.title for piece in cut if piece.kind == kind}) for kind in ("bad", "good")
    }
    return (
        f'<span class="tally"><span class="bad">{counts["bad"]} invented</span>'
        f'<span class="good">{counts["good"]} found</span></span>'
    )


def _failure(error: Exception) -> str:
    advice = getattr(error, "advice", "") or "Change the request and try again."
    return (
        f'<p class="failure">{escaped(str(error) or type(error).__name__)}'
        f"<br><em>{escaped(advice)}</em></p>"
    )


def _prose(text: str, cut: Sequence[Piece]) -> str:
    """The answer with a place to click for every word; an object of several words is one place."""
    single = words(text)
    parts = []
    for piece in cut:
        if piece.kind:
            title = f"{piece.title} · click to see where the model looked"
            place = _place(piece.text, (piece.start, piece.end))
            parts.append(f'<mark class="{piece.kind}" title="{escaped(title)}">{place}</mark>')
            continue
        end = piece.start
        for span in _inside(single, piece):
            parts.append(_gap(text[end : span[0]]) + _place(text[slice(*span)], span))
            end = span[1]
        parts.append(_gap(text[end : piece.end]))
    return "".join(parts)


def _inside(spans: Collection[tuple[int, int]], piece: Piece) -> list[tuple[int, int]]:
    cut = [(max(start, piece.start), min(end, piece.end)) for start, end in spans]
    return [(start, end) for start, end in cut if start < end]


def _place(text: str, span: tuple[int, int]) -> str:
    return (
        f'<span class="word" role="button" tabindex="-1" data-start="{span[0]}" '
        f'data-end="{span[1]}">{escaped(text)}</span>'
    )


def _gap(text: str) -> str:
    """What stands between words: word-level models put a blank before punctuation."""
    return escaped(re.sub(r"\s+([.,?!:;])", r"\1", text))
