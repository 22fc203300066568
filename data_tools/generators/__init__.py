"""Generators: what continues a caption by one sentence.

`SentenceRequest` and `Sample` are all that a pipeline and a generator say to each other, so that a
model in this process (`hf`), a server elsewhere (`openai`) and a script in a test are the same to
the pipeline.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.pictures import Picture

__all__ = ["GeneratorError", "Sample", "SentenceGenerator", "SentenceRequest"]


@dataclass(frozen=True)
class SentenceRequest:
    """A caption to be continued.

    Attributes:
        picture: The picture that is described.
        question: What the user asked, without placeholders.
        context: The caption so far: whole sentences, single blanks between them, no blank at the
            end; "" at the beginning.
        seed: Decides the samples of this request, whatever else is sampled beside it.
    """

    picture: Picture
    question: str
    context: str
    seed: int


@dataclass(frozen=True)
class Sample:
    """One possible next sentence.

    Attributes:
        text: The sentence with its closing mark, without blanks around it; "" if the model ended
            the caption instead.
        finished: Whether the model ended the caption with this sample.
    """

    text: str
    finished: bool


class GeneratorError(Exception):
    """One request cannot be answered, and others may: no reply, prompt too long, picture refused.

    Its message is the reason, for the record of the image.
    """


class SentenceGenerator(ABC):
    """Samples next sentences."""

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What determines the samples (model, weights, template ...), as JSON values."""

    @abstractmethod
    def sample_sentences(
        self, requests: Sequence[SentenceRequest], n: int, temperature: float
    ) -> list[list[Sample] | GeneratorError]:
        """Samples ``n`` next sentences for every request.

        Args:
            requests: Captions to be continued; at most one per picture.
            n: Samples per request.
            temperature: Sampling temperature; > 0.

        Returns:
            Per request its samples in the order drawn, or why there are none.
        """

    def forget(self, pictures: Sequence[Picture]) -> None:
        """Frees what was kept for pictures whose captions are complete; by default nothing is."""
