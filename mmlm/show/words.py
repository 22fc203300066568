"""An answer cut into pieces: objects that are in the picture, objects that are not, the rest.

Objects are read from the text as CHAIR reads them (`benchmarks.chair`), so that what a person sees
in red is what the scorer counts. One thing differs: CHAIR reads captions and counts every object
that is named, while people also ask questions. An object that an answer denies ("there is no dog")
is judged as a denial.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rich.text import Text

__all__ = ["Kind", "Piece", "coloured", "pieces", "words"]

Kind = Literal["good", "bad", ""]

#: What makes the objects behind it denied, up to the end of the clause.
_DENIAL = re.compile(r"\b(?:no|not|without|never|neither|nor|cannot)\b|n['’]t\b", re.I)
_CLAUSE_END = re.compile(r"[.!?;:,]|\b(?:but|however|though|although|instead)\b", re.I)

#: Styles for terminals. Underlining tells the two apart without colours, too.
_STYLES: dict[Kind, str] = {"good": "green", "bad": "bold red underline", "": ""}


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of an answer; the pieces of an answer follow one another without a gap.

    Attributes:
        text: The part as it stands in the answer.
        start: Its first character in the answer.
        end: The character behind its last one.
        kind: "good" for an object that is in the picture or rightly denied, "bad" for one that is
            invented or wrongly denied, "" for the rest.
        title: What was made of it ("dog: invented"); "" for the rest.
        name: The COCO object that it names; "" for the rest.
        denied: Whether the answer says that this object is not there.
    """

    text: str
    start: int
    end: int
    kind: Kind = ""
    title: str = ""
    name: str = ""
    denied: bool = False


def pieces(
    text: str, truth: Collection[str] | None, asked: Collection[str] | None = None
) -> tuple[Piece, ...]:
    """Cuts an answer at the objects that it names.

    Args:
        text: The answer.
        truth: COCO names of the objects in the picture. None: nothing is known, and the whole
            answer is one piece.
        asked: Objects about which something is known at all; others stay without a verdict. None:
            the truth is complete, and what is not in it is not in the picture.

    Returns:
        The pieces in order; none for an empty answer.
    """
    if not text:
        return ()
    if truth is None:
        return (Piece(text, 0, len(text)),)
    from benchmarks.chair.captions import CaptionScore
    from mmlm.language.objects import caption_words, mentions

    reading = caption_words(text)
    caption = CaptionScore(0, text, frozenset(truth), reading, mentions(reading), known_image=True)
    found: list[Piece] = []
    end = 0
    for first, behind, name in caption.places():
        if first < end or (asked is not None and name not in asked):
            continue
        if first > end:
            found.append(Piece(text[end:first], end, first))
        denied = _denied(text[:first])
        kind, said = _verdict(name in truth, denied)
        piece = Piece(text[first:behind], first, behind, kind, f"{name}: {said}", name, denied)
        found.append(piece)
        end = behind
    if end < len(text):
        found.append(Piece(text[end:], end, len(text)))
    return tuple(found)


def _verdict(there: bool, denied: bool) -> tuple[Kind, str]:
    """What is to be said of an object that an answer names, or denies."""
    if denied:
        return ("bad", "denied, but in the picture") if there else ("good", "rightly denied")
    return ("good", "in the picture") if there else ("bad", "invented")


def _denied(before: str) -> bool:
    """Whether the clause that a text ends in denies what follows."""
    clause = _CLAUSE_END.split(before)[-1]
    return _DENIAL.search(clause) is not None


def words(text: str) -> tuple[tuple[int, int], ...]:
    """Where the words of an answer stand: first character and the one behind the last.

    Letters, digits, and hyphens or apostrophes between them; punctuation is no word.
    """
    return tuple(match.span() for match in re.finditer(r"\w+(?:[-'’]\w+)*", text))


def coloured(
    text: str, truth: Collection[str] | None, asked: Collection[str] | None = None
) -> Text:
    """An answer for a terminal: found objects green, invented ones red and underlined.

    Args:
        text: The answer.
        truth: As in `pieces`.
        asked: As in `pieces`.
    """
    from rich.text import Text

    shown = Text()
    for piece in pieces(text, truth, asked):
        shown.append(piece.text, _STYLES[piece.kind])
    return shown
