"""From a sentence that has been read to the objects it names: COCO words and concrete nouns.

This part is the same for all back ends that read words; they differ in who tags the words and finds
the noun phrases.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field

from data_tools.sentinel.objects import ObjectMention, nouns
from data_tools.sentinel.objects.coco import (
    COCO_NAMES,
    WORD_LISTS,
    WordList,
    canonical,
    find_coco,
)
from data_tools.sentinel.objects.reading import Reading, Token, lowered

__all__ = ["NOT_OBJECTS", "MentionRules"]

NOT_OBJECTS = frozenset(
    # The picture itself, and its parts.
    "picture image photo photograph snapshot shot drawing painting display frame focus theme "
    "object thing element item detail feature space surrounding surroundings backdrop scenery "
    "location structure "
    # What the first sense makes of words of description: "overall" is a garment, "tidy" a box.
    "overall addition tidy cozy lush closer short total facing back base content option depth "
    "world life nature weather air energy event gathering company transportation relaxation "
    "viewer someone group pair row line piece slice member individual".split()
) | {"focal point", "weather condition", "blue sky"}
"""Nouns that pass WordNet's test and name nothing a detector could find. Ours, not SENTINEL's."""

_AMOUNTS = frozenset(
    "pair piece group couple set variety row bunch slice number lot series array line stack pile "
    "collection assortment cluster crowd herd flock part kind sort type portion range mix mixture "
    "pack handful team selection combination dozen trio".split()
)
"""Before "of" these say how much there is of an object: "a pair of skis" are skis."""

_LONGEST_NAME = 3
"""Words of the longest name that is looked up as a whole in WordNet ("palm tree")."""
_PLURALS = ("NNS", "NNPS")
_PARTS_OF_NAMES = ("NN", "JJ", "VBG", "VBN")


@dataclass(frozen=True)
class MentionRules:
    """How objects are found among the words of a sentence.

    Attributes:
        coco_only: Count COCO's 80 objects only: for detectors that know no others.
        ignored: Lemmas that are no objects although WordNet calls them concrete.
        lemmatise_every_token: Parity with SENTINEL's code, which takes every token for a noun, so
            that "was" becomes "wa" and somebody who "bears" a load a bear. Default: the dictionary
            form of nouns only.
        word_list: "chair", or "authors" for parity with SENTINEL's code.

    Raises:
        ValueError: For an unknown word list.
    """

    coco_only: bool = False
    ignored: Collection[str] = field(default=NOT_OBJECTS)
    lemmatise_every_token: bool = False
    word_list: WordList = "chair"

    def __post_init__(self) -> None:
        if self.word_list not in WORD_LISTS:
            raise ValueError(
                f"word_list must be one of {', '.join(WORD_LISTS)}, got {self.word_list!r}"
            )

    def facts(self) -> dict[str, object]:
        """The settings as JSON values."""
        return {
            "coco_only": self.coco_only,
            "ignored": sorted(self.ignored),
            "lemmatise_every_token": self.lemmatise_every_token,
            "word_list": self.word_list,
        }

    def mentions(self, sentence: str, reading: Reading) -> list[ObjectMention]:
        """Objects that a sentence names, in order; COCO words first claim their tokens.

        Args:
            sentence: The sentence.
            reading: Its tokens and heads.
        """
        found = []
        claimed: set[int] = set()
        for word, first, end in find_coco(self._normal(reading), self.word_list):
            claimed.update(range(first, end))
            found.append(_mention(sentence, reading, first, end, word))
        for head in reading.heads:
            if head in claimed or self._is_amount(reading, head):
                continue
            first, name = _name(reading, head, claimed)
            if _is_concrete(name) and self.allows(name):
                found.append(_mention(sentence, reading, first, head + 1, name))
        return sorted(found, key=lambda mention: mention.start)

    def _normal(self, reading: Reading) -> list[str]:
        if self.lemmatise_every_token:
            return [nouns.lemma(lowered(token.text)) for token in reading.tokens]
        small = [(lowered(token.text), token.is_noun) for token in reading.tokens]
        return [nouns.singular(text) if noun else text for text, noun in small]

    def _is_amount(self, reading: Reading, head: int) -> bool:
        following = reading.tokens[head + 1 : head + 2]
        return (
            bool(following)
            and following[0].text.lower() == "of"
            and _name_form(reading.tokens[head]) in _AMOUNTS
        )

    def allows(self, name: str) -> bool:
        """Whether the settings let a concrete noun or phrase count as an object."""
        if self.coco_only:
            return canonical(name) in COCO_NAMES
        return name not in self.ignored


def _is_concrete(name: str) -> bool:
    """WordNet's test for a name as a whole: "palm tree" is one noun there."""
    kind = nouns.noun_class(name)
    return kind is not None and kind not in nouns.ABSTRACT


def _name_form(token: Token) -> str:
    """Form in which a noun names an object: "shorts" is no plural of something else."""
    text = lowered(token.text)
    if nouns.is_noun(text) and (token.tag not in _PLURALS or nouns.noun_class(text) == "artifact"):
        return text
    return nouns.singular(text)


def _name(reading: Reading, head: int, claimed: set[int]) -> tuple[int, str]:
    """The longest name in WordNet that ends with a head, and where it begins."""
    last = _name_form(reading.tokens[head])
    for first in range(max(0, head - _LONGEST_NAME + 1), head):
        before = reading.tokens[first:head]
        if claimed.isdisjoint(range(first, head)) and all(
            token.tag.startswith(_PARTS_OF_NAMES) for token in before
        ):
            name = " ".join([*(token.text.lower() for token in before), last])
            if nouns.is_noun(name):
                return first, name
    return head, last


def _mention(sentence: str, reading: Reading, first: int, end: int, name: str) -> ObjectMention:
    start, stop = reading.tokens[first].start, reading.tokens[end - 1].end
    return ObjectMention(sentence[start:stop], name, canonical(name), start, stop)
