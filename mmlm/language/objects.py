"""The COCO objects that a caption names, as the CHAIR scorers read it.

Order of the steps (it matters): lower-case, tokenise, normalise each token, merge two-word names,
drop "seat" beside "toilet", look the words up in the synonym list. See `benchmarks.chair` for the
two variants of the normalisation.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

from mmlm.language import words
from mmlm.language.tables import load_table

__all__ = [
    "VARIANTS",
    "CaptionWords",
    "Mention",
    "Variant",
    "caption_words",
    "check_variant",
    "mentions",
    "node_of_word",
    "node_words",
    "without_toilet_seats",
]

Variant = Literal["wordnet", "pattern"]
VARIANTS: tuple[Variant, ...] = ("wordnet", "pattern")


@dataclass(frozen=True, slots=True)
class Mention:
    """One object named in a caption.

    Attributes:
        word: The normalised word or two-word name, e.g. "puppy".
        node: The COCO object it stands for, e.g. "dog".
        token_index: Position of its first token in `CaptionWords.tokens`.
        token_count: Number of its tokens, 1 or 2.
        word_index: Position in `CaptionWords.words`.
        sentence: Index of the sentence it stands in, from 0.
    """

    word: str
    node: str
    token_index: int
    token_count: int
    word_index: int
    sentence: int


@dataclass(frozen=True, slots=True)
class CaptionWords:
    """A caption as CHAIR reads it.

    Attributes:
        tokens: NLTK's tokens of the lower-cased caption.
        sentence: Sentence index of each token.
        words: Normalised words after merging two-word names; their number is the length.
        first_token: Position of each word's first token.
    """

    tokens: tuple[str, ...]
    sentence: tuple[int, ...]
    words: tuple[str, ...]
    first_token: tuple[int, ...]

    @property
    def sentences(self) -> list[str]:
        """The sentences as blank-joined tokens without closing punctuation."""
        text: dict[int, list[str]] = {}
        for token, index in zip(self.tokens, self.sentence, strict=True):
            text.setdefault(index, []).append(token)
        joined = (" ".join(tokens).rstrip(" .!?") for tokens in text.values())
        return [sentence for sentence in joined if sentence]


def caption_words(caption: str, variant: Variant = "wordnet") -> CaptionWords:
    """Lower-cases, tokenises, normalises and merges two-word names, in this order."""
    check_variant(variant)
    tokens, sentence = words.tokenize(caption.lower())
    if variant == "pattern":
        normal = [words.singularize(token) for token in tokens]
    else:
        letters = words.part_of_speech(tokens)
        normal = [words.lemmatize(t, letter) for t, letter in zip(tokens, letters, strict=True)]
    double = _double_words()
    merged, first, position = [], [], 0
    while position < len(normal):
        pair = double.get(" ".join(normal[position : position + 2]))
        # A lone last word never has a blank, so it cannot be a key.
        merged.append(normal[position] if pair is None else pair)
        first.append(position)
        position += 1 if pair is None else 2
    return CaptionWords(tokens, sentence, tuple(merged), tuple(first))


def node_words(caption: str, variant: Variant = "wordnet") -> list[str]:
    """COCO objects named in a caption, in order, repeats included."""
    return [mention.node for mention in mentions(caption_words(caption, variant))]


def mentions(reading: CaptionWords) -> tuple[Mention, ...]:
    """The objects named in a caption, in order, repeats included."""
    nodes = node_of_word()
    ends = (*reading.first_token[1:], len(reading.tokens))
    found = []
    for index in without_toilet_seats(reading.words):
        word = reading.words[index]
        if (node := nodes.get(word)) is not None:
            first = reading.first_token[index]
            found.append(
                Mention(word, node, first, ends[index] - first, index, reading.sentence[first])
            )
    return tuple(found)


def without_toilet_seats(merged: tuple[str, ...]) -> list[int]:
    """Positions of the words that may be objects: a "seat" beside a "toilet" is part of it."""
    if "toilet" in merged and "seat" in merged:
        return [i for i, word in enumerate(merged) if word != "seat"]
    return list(range(len(merged)))


@functools.cache
def node_of_word() -> dict[str, str]:
    """COCO object of every word in the synonym list.

    Spelling and stray blanks are the official ones: " motor bike", " cheesecake" and "iPhone" are
    in it and can never match. A few words stand in two rows; the later row wins, as in the scorer.
    """
    return {word: row[0] for row in load_table("synonyms.json") for word in row}


def check_variant(variant: str) -> None:
    """Refuses an unknown word procedure.

    Raises:
        ValueError: If it is neither "wordnet" nor "pattern".
    """
    if variant not in VARIANTS:
        raise ValueError(f"Unknown CHAIR variant {variant!r}; there are: {', '.join(VARIANTS)}.")


@functools.cache
def _double_words() -> dict[str, str]:
    return load_table("double_words.json")
