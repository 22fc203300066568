"""Which objects a sentence names: the question that SENTINEL asks about every candidate.

Three back ends answer it: ``rules`` (no dependency), ``spacy`` (extra ``nlp``) and ``sng``; all
give the same kind of mention, so that the rest of the pipeline does not know which one ran.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

__all__ = ["ObjectExtractor", "ObjectMention"]


@dataclass(frozen=True)
class ObjectMention:
    """One object that a sentence names.

    Attributes:
        text: As it stands in the sentence, e.g. "Puppies".
        lemma: Its dictionary form in lower case, e.g. "puppy": what detectors are asked.
        canonical: What it is counted as: the COCO object if it is a word for one ("dog"), else
            the lemma.
        start: First character in the sentence.
        end: Behind its last character.
    """

    text: str
    lemma: str
    canonical: str
    start: int
    end: int


class ObjectExtractor(ABC):
    """Finds the objects that sentences name."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What determines the mentions (name, versions, tables), as JSON values."""

    @abstractmethod
    def extract(self, sentences: Sequence[str]) -> list[list[ObjectMention]]:
        """Mentions per sentence, in order of appearance; an object named twice comes twice."""
