"""Words for COCO's objects, and when two names mean the same object.

Two word lists are there. ``chair``, the default, is the list of the CHAIR scorer with the few words
that SENTINEL adds; ``authors`` is SENTINEL's own edition of it. "orange" is in neither, because it
is mostly a colour: an orange that is a noun is found by its noun.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

from data_tools.sentinel.objects import nouns
from mmlm.language.objects import without_toilet_seats
from mmlm.language.tables import load_table
from mmlm.language.words import tokenize

__all__ = [
    "COCO_NAMES",
    "WORD_LISTS",
    "CocoWord",
    "WordList",
    "canonical",
    "coco_words",
    "find_coco",
    "same_object",
]

WordList = Literal["chair", "authors"]
WORD_LISTS: tuple[WordList, ...] = ("chair", "authors")

COLOUR = "orange"
# How SENTINEL's edition (its code of 2025) differs from CHAIR's list.
_ADDED = {
    "person": ("brother", "pedestrian"),
    "dining table": ("coffee table",),
    "remote": ("remote control",),
}
_REMOVED = {
    "person": ("mother", "adult", "passenger", "baby"),
    "boat": ("sailboard",),
    "tv": ("monitor",),
    "remote": ("remote",),
}
_ADDED_PAIRS = ("dining table", "coffee table")
# SENTINEL lists "remote control" and never joins the two words, so it finds no remote at all.
_OUR_PAIRS = ("remote control",)


class _Words(NamedTuple):
    nodes: Mapping[str, str]
    pairs: Mapping[str, str]


class CocoWord(NamedTuple):
    """A word for a COCO object among the tokens of a sentence.

    Attributes:
        word: The word or two-word name of the list, e.g. "puppy".
        first: Position of its first token.
        end: Behind its last one.
    """

    word: str
    first: int
    end: int


@functools.cache
def _words(word_list: WordList) -> _Words:
    authors = word_list == "authors"
    nodes: dict[str, str] = {}
    for node, *others in load_table("synonyms.json"):
        # CHAIR never finds its " cheesecake" and "iPhone", as they are spelt; SENTINEL strips.
        row = dict.fromkeys(word.strip().lower() for word in (node, *others))
        removed = _REMOVED.get(node, ()) if authors else ()
        kept = [word for word in row if word not in removed]
        nodes |= {word: node for word in (*kept, *_ADDED.get(node, ()))}
    del nodes[COLOUR]
    # SENTINEL dropped "baby elephant" and the like, which changes nothing: its list has no "baby".
    pairs = dict(load_table("double_words.json"))
    pairs |= {pair: pair for pair in (*_ADDED_PAIRS, *(() if authors else _OUR_PAIRS))}
    return _Words(nodes, pairs)


COCO_NAMES = frozenset(row[0] for row in load_table("synonyms.json"))
"""COCO's 80 objects."""


def find_coco(normal: Sequence[str], word_list: WordList = "chair") -> list[CocoWord]:
    """COCO words among normalised tokens, in order, repeats included.

    Args:
        normal: Tokens in lower case, in their dictionary form where that is wanted.
        word_list: Which list.
    """
    nodes, pairs = _words(word_list)
    merged: list[CocoWord] = []
    position = 0
    while position < len(normal):
        pair = pairs.get(" ".join(normal[position : position + 2]))
        end = position + (1 if pair is None else 2)
        merged.append(CocoWord(pair or normal[position], position, end))
        position = end
    allowed = without_toilet_seats(tuple(found.word for found in merged))
    return [merged[index] for index in allowed if merged[index].word in nodes]


def coco_words(sentence: str) -> list[str]:
    """SENTINEL's own reading: COCO words of a sentence, in order, repeats included.

    Lower case, words, noun lemma of every token, two-word names, word list ``authors``. This is
    `RulesExtractor` with both parity switches, without what is no COCO word.
    """
    tokens, _ = tokenize(sentence.lower())
    return [found.word for found in find_coco([nouns.lemma(t) for t in tokens], "authors")]


@functools.lru_cache(maxsize=65536)
def canonical(name: str) -> str:
    """What a name is counted as: its COCO object if it is a word for one, else its lemma.

    Args:
        name: One or several words in any case; of several the last one may be a plural.
    """
    nodes, pairs = _words("chair")
    words = name.lower().split()
    if not words:
        return ""
    last = words[-1]
    for form in (last, nouns.singular(last), nouns.lemma(last)):
        known = " ".join([*words[:-1], form])
        known = pairs.get(known, known)
        if known in nodes:
            return nodes[known]
    # "shorts" and "gas" have entries of their own; they are no plurals.
    return " ".join([*words[:-1], last if nouns.is_noun(last) else nouns.singular(last)])


def same_object(one: str, other: str) -> bool:
    """Whether two names mean the same object: equal, in the same group, or after lemmatising."""
    return canonical(one) == canonical(other)
