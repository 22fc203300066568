"""What sentences say, read once: their objects, and whether they are about an unnamed "it"."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from data_tools.sentinel.objects import ObjectExtractor, ObjectMention
from mmlm.language.words import penn_tags, tokenize

__all__ = ["Reading", "SentenceReader", "only_subject_is_a_pronoun"]

_PRONOUNS = frozenset({"it", "they", "he", "she"})
_DEMONSTRATIVES = frozenset({"this", "that", "these", "those"})
_FINITE = frozenset({"VBZ", "VBP", "VBD", "MD"})
_BOUND = 20_000


class Reading(NamedTuple):
    """What one sentence says."""

    mentions: tuple[ObjectMention, ...]
    pronoun: bool


class SentenceReader:
    """Reads sentences, each only once: the candidates of a step often come again in the next.

    Args:
        extractor: Finds the objects.
        pronouns: Whether to look for pronouns; without, no sentence has one.
    """

    def __init__(self, extractor: ObjectExtractor, *, pronouns: bool) -> None:
        self._extractor = extractor
        self._pronouns = pronouns
        self._known: dict[str, Reading] = {}

    def read(self, sentences: Sequence[str]) -> dict[str, Reading]:
        """Reads sentences, all new ones in one call of the extractor."""
        if len(self._known) > _BOUND:
            self._known.clear()
        new = [s for s in dict.fromkeys(sentences) if s not in self._known]
        for sentence, mentions in zip(new, self._extractor.extract(new), strict=True):
            pronoun = self._pronouns and only_subject_is_a_pronoun(sentence)
            self._known[sentence] = Reading(tuple(mentions), pronoun)
        return {sentence: self._known[sentence] for sentence in sentences}


def only_subject_is_a_pronoun(sentence: str) -> bool:
    """Whether the subject of the first verb is a pronoun that stands for something named earlier.

    "It is on the table." and "These are small." are about nothing that can be checked; "There is a
    cat.", "You can see a cat." and "The dog and it play." are not meant.

    Args:
        sentence: One English sentence.
    """
    tokens = tokenize(sentence.lower()).words
    if not (_PRONOUNS | _DEMONSTRATIVES) & set(tokens):
        return False
    tags = penn_tags(tokens)
    verb = next((i for i, tag in enumerate(tags) if tag in _FINITE), None)
    if verb is None:
        return False
    subject = verb - 1
    while subject >= 0 and tags[subject].startswith("RB"):
        subject -= 1
    if subject < 0 or (subject > 0 and tags[subject - 1] == "CC"):
        return False
    # A demonstrative right before the verb has no noun of its own.
    return tokens[subject] in _PRONOUNS | _DEMONSTRATIVES
