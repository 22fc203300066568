"""What the training program asks of its data: a protocol, met by any class named in a YAML file.

A source is a function of an index. Whatever is drawn for an index is the same in every process and
in every run, so a training that was cut off goes on at the same place of the same stream, and
several processes take disjoint indices without talking to each other.
"""

from __future__ import annotations

from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Round", "Source", "Tail"]

Round: TypeAlias = list[tuple[str, str]]
"""Question and answer turns of one conversation; the image stands before the first question."""


@runtime_checkable
class Source(Protocol):
    """An endless stream of labelled pictures with conversations about them."""

    @property
    def n_classes(self) -> int:
        """Number of object classes, without the background."""

    def vocabulary(self) -> list[str]:
        """All words of all texts, in a fixed order, without special tokens."""

    def content_words(self) -> list[str]:
        """The words of the vocabulary that depend on the picture, each once."""

    def texts(self, index: int) -> tuple[Round, Round]:
        """A caption round (one turn) and a question round (several turns) about a picture."""

    def picture(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[int]]:
        """The picture [S, S, 3], its class map [S, S] and the classes that are in it.

        The class map is 0 for background and 1 + class otherwise; classes count from 0.
        """


class Tail:
    """A source from an index on, so that the stages of a training share no picture.

    Args:
        source: the whole stream.
        first: index in it that becomes index 0.
    """

    def __init__(self, source: Source, first: int) -> None:
        self._source, self._first = source, first

    @property
    def n_classes(self) -> int:
        """As the whole stream."""
        return self._source.n_classes

    def vocabulary(self) -> list[str]:
        """As the whole stream."""
        return self._source.vocabulary()

    def content_words(self) -> list[str]:
        """As the whole stream."""
        return self._source.content_words()

    def texts(self, index: int) -> tuple[Round, Round]:
        """The texts at `first + index`."""
        return self._source.texts(self._first + index)

    def picture(self, index: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8], list[int]]:
        """The picture at `first + index`."""
        return self._source.picture(self._first + index)
