"""What sentences say: their objects, and whether they are about an unnamed "it"."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

from data_tools.sentinel.objects import ObjectExtractor, ObjectMention
from data_tools.sentinel.objects.pronouns import Coreference, only_pronoun_subject

__all__ = ["Reading", "SentenceReader"]

_REMEMBERED = 20_000


class Reading(NamedTuple):
    """What one sentence says.

    Attributes:
        mentions: Its objects, in order.
        pronoun: Whether its only subject is a pronoun that nobody resolved.
    """

    mentions: tuple[ObjectMention, ...]
    pronoun: bool


class SentenceReader:
    """Reads sentences, all of a step in one call of the extractor.

    Args:
        extractor: Finds the objects.
        pronouns: Whether to look for pronouns; without, no sentence has one.
        coreference: Names what pronouns stand for; then none is left to look for.
    """

    def __init__(
        self,
        extractor: ObjectExtractor,
        *,
        pronouns: bool,
        coreference: Coreference | None = None,
    ) -> None:
        self._extractor = extractor
        self._coreference = coreference
        self._look = pronouns and coreference is None
        self._is_pronoun = functools.lru_cache(_REMEMBERED)(only_pronoun_subject)

    def read(self, sentences: Sequence[tuple[str, str]]) -> list[Reading]:
        """Reads sentences.

        Args:
            sentences: Each with the sentence before it, "" at the beginning.
        """
        resolved = [self._resolve(before, sentence) for before, sentence in sentences]
        different = list(dict.fromkeys(resolved))
        mentions = dict(zip(different, self._extractor.extract(different), strict=True))
        return [
            Reading(
                tuple(_in_sentence(mention, sentence) for mention in mentions[text]),
                self._look and self._is_pronoun(sentence),
            )
            for (_, sentence), text in zip(sentences, resolved, strict=True)
        ]

    def _resolve(self, before: str, sentence: str) -> str:
        if self._coreference is None:
            return sentence
        return self._coreference.resolve(before, sentence)


def _in_sentence(mention: ObjectMention, sentence: str) -> ObjectMention:
    """A mention with its place in the sentence as the model wrote it.

    In a resolved text everything behind a name that was put in has moved; a name that is not in
    the sentence has no place.
    """
    if sentence[mention.start : mention.end] == mention.text:
        return mention
    start = sentence.find(mention.text)
    end = start + len(mention.text) if start >= 0 else 0
    return dataclasses.replace(mention, start=max(start, 0), end=end)
