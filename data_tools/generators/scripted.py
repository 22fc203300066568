"""A generator that says what it was told: for tests, and for dry runs without a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from data_tools.generators import GeneratorError, Sample, SentenceGenerator, SentenceRequest
from data_tools.pictures import Picture

__all__ = ["Script", "ScriptedGenerator"]

Answer: TypeAlias = "Sequence[str | Sample] | GeneratorError"
Script: TypeAlias = "Mapping[tuple[str, str], Answer] | Callable[[str, str, int], Answer]"
"""Answers by (picture's id, context), or a function of (picture's id, context, seed)."""


class ScriptedGenerator(SentenceGenerator):
    """Answers from a script.

    Texts stand for samples that did not end the caption, "" for one that did. A mapping ends every
    caption that it does not know. An answer is given as it is, whatever ``n``, so that a script
    can also play a generator that comes up short.

    Args:
        script: The answers.
        name: What it is called in records.

    Attributes:
        calls: The requests of every call, for tests of what was asked together.
        forgotten: Ids of the pictures that the pipeline was done with, in order.
    """

    def __init__(self, script: Script, name: str = "scripted") -> None:
        self._script = script
        self._name = name
        self.calls: list[list[SentenceRequest]] = []
        self.forgotten: list[str] = []

    @property
    def facts(self) -> Mapping[str, Any]:
        """The name of the script."""
        return {"generator": "scripted", "model": self._name}

    def sample_sentences(
        self, requests: Sequence[SentenceRequest], n: int, temperature: float
    ) -> list[list[Sample] | GeneratorError]:
        """Looks the answers up."""
        self.calls.append(list(requests))
        return [self._answer(request, n) for request in requests]

    def _answer(self, request: SentenceRequest, n: int) -> list[Sample] | GeneratorError:
        if callable(self._script):
            answer = self._script(request.picture.id, request.context, request.seed)
        else:
            answer = self._script.get((request.picture.id, request.context), [""] * n)
        if isinstance(answer, GeneratorError):
            return answer
        return [one if isinstance(one, Sample) else Sample(one, not one) for one in answer]

    def forget(self, pictures: Sequence[Picture]) -> None:
        """Notes which captions are complete."""
        self.forgotten += [picture.id for picture in pictures]
