"""Words of answers whose maps are shown, matched over the answers to one question."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mmlm.errors import InputError
from mmlm.show.words import Kind, pieces, words

if TYPE_CHECKING:
    from mmlm.show.inspection import Inspection
    from mmlm.show.truth import Known

__all__ = ["Said", "Spot", "spots"]

_WORDS_SHOWN = 12
"""Words that are shown of answers that name no object."""


@dataclass(frozen=True)
class Said:
    """Where an answer says a word.

    Attributes:
        start: Its first character.
        end: The character behind its last one.
        kind: Verdict on it, as in `mmlm.show.words.Piece`.
    """

    start: int
    end: int
    kind: Kind = ""


@dataclass(frozen=True)
class Spot:
    """A word that one or several answers say.

    Attributes:
        text: The word, as the first answer that has it writes it.
        number: Which occurrence it is, from 1.
        said: By the number of the answer.
    """

    text: str
    number: int
    said: Mapping[int, Said]

    @property
    def anchor(self) -> str:
        """A name that is unique among the spots of an inspection, for links."""
        return f"w-{re.sub(r'[^a-z0-9]+', '-', self.text.lower())}-{self.number}"


def spots(inspection: Inspection, wanted: Sequence[str] = ()) -> tuple[Spot, ...]:
    """The words whose maps are worth showing, in the order in which they are first said.

    Args:
        inspection: The answers.
        wanted: Words or phrases to look for. None given: the objects that the answers name; if
            they name none, their first words.

    Raises:
        InputError: If an answer has none of the wanted words.
    """
    texts = [arm.text for arm in inspection.arms]
    known = inspection.pictures[0].known if len(inspection.pictures) == 1 else None
    if wanted:
        found = [_phrases(text, wanted) for text in texts]
        if missing := [w for w in wanted if not any(_has(text, w) for text in texts)]:
            raise InputError(
                f"No answer has the word {missing[0]!r}.",
                advice=f"The answers are: {'; '.join(repr(text) for text in texts)}.",
            )
    else:
        found = [_objects(text, known) for text in texts]
        if not any(found):
            found = [[Said(*span) for span in words(text)[:_WORDS_SHOWN]] for text in texts]
    matched: dict[tuple[str, int], dict[int, Said]] = {}
    for number, (text, said) in enumerate(zip(texts, found, strict=True)):
        counts: Counter[str] = Counter()
        for one in said:
            word = text[one.start : one.end].lower()
            counts[word] += 1
            matched.setdefault((word, counts[word]), {})[number] = one
    return tuple(Spot(word, n, said) for (word, n), said in matched.items())


def _objects(text: str, known: Known | None) -> list[Said]:
    objects, asked = (known.objects, known.asked) if known else (frozenset(), None)
    return [
        Said(piece.start, piece.end, piece.kind if known else "")
        for piece in pieces(text, objects, asked)
        if piece.kind
    ]


def _has(text: str, phrase: str) -> bool:
    return bool(_phrases(text, [phrase]))


def _phrases(text: str, wanted: Sequence[str]) -> list[Said]:
    choice = "|".join(re.escape(w) for w in sorted(wanted, key=len, reverse=True))
    found = re.finditer(rf"(?<!\w)(?:{choice})(?!\w)", text, re.IGNORECASE)
    return [Said(*match.span()) for match in found]
