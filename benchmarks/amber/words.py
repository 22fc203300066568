"""AMBER's reading of a description: its nouns, and which of them are in the picture.

Paper: Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination
Evaluation", arXiv 2311.07397. The rules are those of the authors' script, surprises included: case
is kept ("TV" is a word of the benchmark, "tv" is not), a noun that is both near an annotated
hallucination and near a true object counts for both, and a safe word is never invented but still
makes the share of invented nouns smaller.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

from mmlm.errors import InputError
from mmlm.language import words
from mmlm.language.tables import load_table

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

__all__ = [
    "NEAR",
    "SIMILARITIES",
    "SPACY_MODEL",
    "Description",
    "Noun",
    "Similarity",
    "Vocabulary",
    "describe",
    "nouns",
    "similarity",
    "vocabulary",
]

NEAR = 0.8
"""Two words above this similarity mean the same (the authors' default)."""

SPACY_MODEL = "en_core_web_lg"
"""The vectors that AMBER's authors compare words with; smaller ones give other numbers."""


_QUOTES = ("``", "''")


class Vocabulary(NamedTuple):
    """The benchmark's words.

    Attributes:
        associated: Every object with the words that may stand for it.
        known: All words that count; other nouns are ignored.
        safe: Words too ambiguous to be called invented.
        lemmas: Singular of the noun forms that lead to a known word.
    """

    associated: Mapping[str, tuple[str, ...]]
    known: frozenset[str]
    safe: frozenset[str]
    lemmas: Mapping[str, str]


@functools.cache
def vocabulary() -> Vocabulary:
    """The word tables shipped in ``benchmarks/data``."""
    raw = load_table("amber_words.json", "benchmarks")
    associated = {word: tuple(others) for word, others in raw["relation"].items()}
    known = frozenset(associated).union(*associated.values())
    return Vocabulary(associated, known, frozenset(raw["safe_words"]), raw["noun_lemmas"])


@dataclass(frozen=True)
class Similarity:
    """How near two words are.

    Attributes:
        name: Part of the metric's name, with the version where there is one.
        score: Two words -> similarity, at most 1.
    """

    name: str
    score: Callable[[str, str], float] = field(repr=False)

    def near(self, word: str, other: str) -> bool:
        """Whether two words count as the same."""
        return self.score(word, other) > NEAR


def _spacy() -> Similarity:
    """Cosine of spaCy's document vectors, as in the authors' script."""
    advice = (
        f"Install it (pip install spacy; python -m spacy download {SPACY_MODEL}), or use the "
        "similarity `exact`, whose numbers are named differently."
    )
    try:
        import spacy
    except ImportError as error:
        raise InputError("The similarity `spacy` needs spaCy.", advice=advice) from error
    try:
        pipeline = spacy.load(SPACY_MODEL)
    except OSError as error:
        raise InputError(
            f"The similarity `spacy` needs spaCy's model {SPACY_MODEL}.", advice=advice
        ) from error
    document = functools.cache(pipeline)

    @functools.cache
    def score(word: str, other: str) -> float:
        with warnings.catch_warnings():
            # A word without a vector is similar to nothing (0), which is what we want to know.
            warnings.simplefilter("ignore", UserWarning)
            return float(document(word).similarity(document(other)))

    return Similarity(f"spacy-{SPACY_MODEL}-{pipeline.meta['version']}", score)


SIMILARITIES: dict[str, Callable[[], Similarity]] = {
    "exact": lambda: Similarity("exact", lambda word, other: float(word == other)),
    "spacy": _spacy,
}


def similarity(name: str = "exact") -> Similarity:
    """A similarity by name.

    Args:
        name: ``exact`` (equal words; ours, needs nothing) or ``spacy`` (the authors').

    Raises:
        ValueError: If the name is unknown.
        InputError: If spaCy or its large English model is not installed. No smaller model is
            taken instead: its numbers would not be comparable.
    """
    if name not in SIMILARITIES:
        raise ValueError(f"Unknown similarity {name!r}; there are: {', '.join(SIMILARITIES)}.")
    return SIMILARITIES[name]()


class Noun(NamedTuple):
    """A noun of a description that is a word of the benchmark.

    Attributes:
        word: Its dictionary form.
        start: Its first character in the description.
        end: The character behind its last one.
    """

    word: str
    start: int
    end: int


def nouns(text: str) -> list[Noun]:
    """The nouns of a text that the benchmark knows, in order, repeats included."""
    table = vocabulary()
    tokens = words.tokenize(text).words
    found = []
    cursor = 0
    for token, tag in zip(tokens, words.penn_tags(tokens), strict=True):
        # The tokeniser rewrites quotation marks, so they are no landmarks. A noun always counts;
        # at worst, in a thicket of quotation marks, it is not marked.
        if token not in _QUOTES and (start := text.find(token, cursor)) >= 0:
            cursor = start + len(token)
        else:
            start = cursor
        lemma = table.lemmas.get(token, token)
        if tag.startswith("NN") and lemma in table.known:
            found.append(Noun(lemma, start, cursor))
    return found


@dataclass(frozen=True)
class Description:
    """What a description says about its picture.

    Attributes:
        nouns: The nouns that count.
        invented: For each of them, whether it is not in the picture.
        covered: For each true object, whether it was named.
        cognitive: For each annotated hallucination, the objects people would expect to be
            invented here, whether it was named.
    """

    nouns: tuple[Noun, ...]
    invented: tuple[bool, ...]
    covered: tuple[bool, ...]
    cognitive: tuple[bool, ...]


def describe(
    text: str, truth: Sequence[str], hallu: Sequence[str], near: Similarity
) -> Description:
    """Compares the nouns of a description with what is and what is not in the picture.

    Args:
        text: The description, case kept.
        truth: Objects in the picture.
        hallu: Objects that are not in it although one might expect them.
        near: How words are compared.

    Raises:
        InputError: If an annotated object is no word of the benchmark.
    """
    inside, outside = _Objects(truth, near), _Objects(hallu, near)
    found = nouns(text)
    invented = tuple(_is_invented(noun.word, inside, outside) for noun in found)
    return Description(tuple(found), invented, tuple(inside.named), tuple(outside.named))


def _is_invented(word: str, inside: _Objects, outside: _Objects) -> bool:
    if word in vocabulary().safe or inside.name(word):
        return False
    outside.name(word)
    outside.name_similar(word)
    return not inside.name_similar(word)


class _Objects:
    """Annotated objects of a picture, and which of them a description has named so far."""

    def __init__(self, objects: Sequence[str], near: Similarity) -> None:
        self.named = [False] * len(objects)
        self._near = near
        # Associated words come first: of two objects the one whose association matches is marked
        # before the one whose own name does.
        self._words = [
            (word, index) for index, name in enumerate(objects) for word in _associated(name)
        ] + [(name, index) for index, name in enumerate(objects)]
        self._first: dict[str, int] = {}
        for word, index in self._words:
            self._first.setdefault(word, index)

    def name(self, word: str) -> bool:
        """Marks the first object that the word stands for; False if there is none."""
        if word not in self._first:
            return False
        self.named[self._first[word]] = True
        return True

    def name_similar(self, word: str) -> bool:
        """Marks the first object with a word near this one; False if there is none."""
        for other, index in self._words:
            if self._near.near(word, other):
                self.named[index] = True
                return True
        return False


def _associated(name: str) -> tuple[str, ...]:
    try:
        return vocabulary().associated[name]
    except KeyError:
        raise InputError(
            f"{name!r} is no object of AMBER, so nothing is known about its synonyms.",
            advice="Use the objects of AMBER's relation.json.",
        ) from None
