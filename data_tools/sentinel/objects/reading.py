"""A sentence as tokens with their places and Penn tags, and which of them head a noun phrase."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from mmlm.language.words import penn_tags, tokenize

__all__ = ["Reading", "Token", "lowered", "read_sentence"]


class Token(NamedTuple):
    """One word of a sentence.

    Attributes:
        text: As it stands there.
        start: First character in the sentence.
        end: Behind the last one.
        tag: Its Penn Treebank tag.
    """

    text: str
    start: int
    end: int
    tag: str

    @property
    def is_noun(self) -> bool:
        """Whether it is tagged as a common or proper noun."""
        return self.tag.startswith("NN")


class Reading(NamedTuple):
    """A sentence that has been read.

    Attributes:
        tokens: Its words.
        heads: Positions of the nouns that say what their noun phrase names, ascending.
    """

    tokens: Sequence[Token]
    heads: Sequence[int]


def lowered(text: str) -> str:
    """Lower case, character by character, so that places in a text stay what they are."""
    return "".join(small if len(small := char.lower()) == 1 else char for char in text)


def read_sentence(sentence: str) -> Reading:
    """Reads a sentence with NLTK's tokeniser and tagger; no further package is needed.

    A noun phrase is taken to be a row of nouns, headed by the last one: in "a kitchen table" that
    is the table.
    """
    words, _ = tokenize(sentence)
    tags = penn_tags(words)
    tokens, cursor = [], 0
    for word, tag in zip(words, tags, strict=True):
        start, end = _place(sentence, word, cursor)
        tokens.append(Token(sentence[start:end], start, end, tag))
        cursor = end
    nouns = [token.is_noun for token in tokens] + [False]
    return Reading(tokens, [i for i in range(len(tokens)) if nouns[i] and not nouns[i + 1]])


def _place(sentence: str, word: str, cursor: int) -> tuple[int, int]:
    """Where a token stands: as it is, or as the quotation mark that NLTK has written anew."""
    spellings = ('"', "``", "''") if word in ("``", "''") else (word,)
    found = [(at, len(s)) for s in spellings if (at := sentence.find(s, cursor)) >= 0]
    start, length = min(found)
    return start, start + length
