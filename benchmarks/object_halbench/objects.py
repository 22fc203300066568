"""Which COCO objects an answer names, as Object HalBench reads it.

Two ways lead from an answer to objects. A judge lists the objects as phrases, and a phrase is read
as a two-word name or as runs of nouns (`Phrases`); or, without a judge, the words of the answer are
looked up directly (`named_in`), every word as a noun, which is also how reference captions become
truth. Both look words up in the *refined* synonym list: CHAIR's without its stray blanks and with
four more words.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from mmlm.errors import InputError
from mmlm.language import words
from mmlm.language.tables import load_table

__all__ = [
    "Named",
    "Phrases",
    "RulePhrases",
    "SpacyPhrases",
    "named_by",
    "named_in",
    "parse_reply",
    "refined_nodes",
    "two_word_names",
]

# What the refined list has beyond CHAIR's.
ADDED = {
    "brother": "person",
    "pedestrian": "person",
    "coffee table": "dining table",
    "remote control": "remote",
}
# Noun forms of these words and of "cheesecake"; the shipped table has those of CHAIR's list.
ADDED_LEMMAS = {
    "brothers": "brother",
    "brethren": "brother",
    "pedestrians": "pedestrian",
    "controls": "control",
    "cheesecakes": "cheesecake",
}


@dataclass(frozen=True, slots=True)
class Named:
    """An object that an answer names.

    Attributes:
        word: The word or two-word name, e.g. "puppy".
        node: The COCO object it stands for, e.g. "dog".
        start: First character in the lower-cased answer; equal to `end` if it was not found.
        end: The character behind the last one.
    """

    word: str
    node: str
    start: int
    end: int


class Phrases(Protocol):
    """Reads an object phrase of a judge, such as "two wooden chairs"."""

    @property
    def name(self) -> str:
        """Goes into the name of the result."""

    def __call__(self, phrase: str) -> list[str]:
        """The two-word names in the phrase if there are any, else its runs of nouns."""


@functools.cache
def refined_nodes() -> dict[str, str]:
    """COCO object of every word of the refined list."""
    rows: list[list[str]] = load_table("synonyms.json")
    return {word.strip(): row[0].strip() for row in rows for word in row} | ADDED


@functools.cache
def two_word_names() -> dict[str, str]:
    """Two-word name -> what it is replaced by.

    All names of the refined list with a blank, CHAIR's rules ("baby bird" is a bird, a "toilet
    seat" a toilet), and two names that only hide a word ("home plate", "train track").
    """
    listed = {word: word for word in refined_nodes() if " " in word}
    rules: dict[str, str] = load_table("double_words.json")
    return listed | rules


def named_in(text: str) -> list[Named]:
    """Objects named in a text, repeats included: every word is read as a noun, without a judge."""
    lower = text.lower()
    tokens = words.tokenize(lower).words
    lemmas = [_noun(token) for token in tokens]
    places = _places(lower, tokens)
    double = two_word_names()
    found: list[tuple[str, int, int]] = []
    at = 0
    while at < len(lemmas):
        pair = double.get(" ".join(lemmas[at : at + 2]))
        last = at if pair is None else at + 1
        found.append((lemmas[at] if pair is None else pair, places[at][0], places[last][1]))
        at = last + 1
    return _objects(found)


def named_by(phrases: Iterable[str], read: Phrases, text: str) -> list[Named]:
    """Objects in the phrases of a judge, each word once.

    Args:
        phrases: What the judge listed.
        read: Reads a phrase.
        text: The answer, to find the phrases in it.
    """
    lower = text.lower()
    found: dict[str, tuple[str, int, int]] = {}
    for phrase in phrases:
        at = lower.find(phrase.lower()) if phrase else -1
        start, end = (at, at + len(phrase)) if at >= 0 else (0, 0)
        for word in read(phrase):
            found.setdefault(word, (word, start, end))
    return _objects(list(found.values()))


def parse_reply(reply: str) -> list[str] | None:
    """The phrases in a judge's reply; None if it holds no JSON list of texts.

    The whole reply, or its last line if judges think aloud first. The official script also takes
    other JSON than a list of texts, and then stumbles over it or reads a text letter by letter.
    """
    candidates = [reply]
    if '["' in reply:
        candidates.append(reply.strip().split("\n")[-1])
    for candidate in candidates:
        try:
            value = json.loads(candidate)
        except (ValueError, RecursionError):
            continue
        if isinstance(value, list) and all(isinstance(phrase, str) for phrase in value):
            return value
    return None


class SpacyPhrases:
    """Phrases read as by the official script: spaCy's lemmas and part-of-speech tags.

    Args:
        model: spaCy's pipeline; the official one is ``en_core_web_trf``.
        parser: A loaded pipeline, instead of loading one.

    Raises:
        InputError: If spaCy or the pipeline is not installed.
    """

    def __init__(
        self, model: str = "en_core_web_trf", parser: Callable[[str], Any] | None = None
    ) -> None:
        self.name = f"spacy-{model}"
        self._parse = _spacy(model) if parser is None else parser

    def __call__(self, phrase: str) -> list[str]:
        """The two-word names in the phrase if there are any, else its runs of nouns."""
        tokens = self._parse(f"a {phrase}")
        return _read([token.lemma_ for token in tokens], [token.tag_ for token in tokens])


class RulePhrases:
    """Phrases read without spaCy: NLTK's tagger and the shipped noun forms. Ours, and labelled so.

    Where the tagger sees no noun at all, the last word is taken for one: a judge was asked for
    names of objects.
    """

    name = "rules"

    def __call__(self, phrase: str) -> list[str]:
        """The two-word names in the phrase if there are any, else its runs of nouns."""
        tokens = words.tokenize(f"a {phrase.lower()}").words
        tags = words.penn_tags(tokens)
        if len(tokens) > 1 and not any(tag.startswith("NN") for tag in tags):
            tags = [*tags[:-1], "NN"]
        # WordNet leaves "men" as it is; a reader of phrases has no reason to.
        return _read(["man" if t == "men" else _noun(t) for t in tokens], tags)


def _read(lemmas: Sequence[str], tags: Sequence[str]) -> list[str]:
    double = two_word_names()
    names: list[str] = []
    at = 0
    while at < len(lemmas):
        name = double.get(" ".join(lemmas[at : at + 2]))
        names += [] if name is None else [name]
        at += 1 if name is None else 2
    return names or _noun_runs(lemmas, tags)


def _noun_runs(lemmas: Sequence[str], tags: Sequence[str]) -> list[str]:
    """Neighbouring nouns as one name: "tennis player" is one, and in no list of synonyms."""
    runs: list[list[str]] = [[]]
    for lemma, tag in zip(lemmas, tags, strict=True):
        if tag in ("NN", "NNS", "NNP", "NNPS"):
            runs[-1].append(lemma)
        elif runs[-1]:
            runs.append([])
    return [" ".join(run) for run in runs if run]


def _objects(found: Sequence[tuple[str, int, int]]) -> list[Named]:
    nodes = refined_nodes()
    present = {word for word, _, _ in found}
    # The seat of a toilet is no chair.
    dropped = {"seat"} if "toilet" in present else set()
    return [
        Named(word, nodes[word], start, end)
        for word, start, end in found
        if word in nodes and word not in dropped
    ]


def _noun(token: str) -> str:
    return ADDED_LEMMAS.get(token) or words.lemmatize(token, "n")


def _places(text: str, tokens: Sequence[str]) -> list[tuple[int, int]]:
    """Where the tokens stand; one that NLTK rewrote (a quotation mark) has no extent."""
    cursor, places = 0, []
    for token in tokens:
        at = text.find(token, cursor)
        places.append((at, at + len(token)) if at >= 0 else (cursor, cursor))
        cursor = places[-1][1]
    return places


def _spacy(model: str) -> Callable[[str], Any]:
    try:
        import spacy
    except ImportError as error:
        raise InputError(
            "Reading phrases as the official script does needs spaCy, which is not installed.",
            advice=f'pip install "mmlm[nlp]" && python -m spacy download {model}; or use rules.',
        ) from error
    try:
        return spacy.load(model)
    except OSError as error:
        raise InputError(
            f"spaCy has no pipeline {model!r}.",
            advice=f"python -m spacy download {model}; or choose another one.",
        ) from error
