"""How a free answer becomes one of a closed list, so that two can be compared as classes."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from benchmarks.pope import PARSERS

if TYPE_CHECKING:
    from collections.abc import Callable

__all__ = ["OTHER", "READERS", "read_answer"]

OTHER = "other"
"""What is none of the expected answers. A class of its own: from "yes" to this is a change."""

_NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
_VALUES = {word: number for number, word in enumerate(_NUMBERS)} | {"none": 0}
_RELATIONS = {
    "left": r"\bleft\b",
    "right": r"\bright\b",
    "above": r"\b(above|over|on top of)\b",
    "below": r"\b(below|under|beneath|underneath)\b",
}


def _existence(text: str) -> str:
    return {True: "yes", False: "no", None: OTHER}[PARSERS["strict"].read(text, "")]


def _count(text: str) -> str:
    words = re.findall(r"[a-z]+|\d+", text.lower())
    numbers = {int(w) if w.isdigit() else _VALUES[w] for w in words if w.isdigit() or w in _VALUES}
    return str(numbers.pop()) if len(numbers) == 1 else OTHER


def _relation(text: str) -> str:
    found = [name for name, pattern in _RELATIONS.items() if re.search(pattern, text.lower())]
    return found[0] if len(found) == 1 else OTHER


READERS: dict[str, Callable[[str], str]] = {
    "existence": _existence,
    "count": _count,
    "relation": _relation,
}
"""The types of questions that are asked, and how their answers are read."""


def read_answer(kind: str, text: str) -> str:
    """The class of an answer: yes, no, a number in digits, left, right, above, below, or other.

    Args:
        kind: Type of the question, a key of `READERS`.
        text: What the model said.

    Raises:
        ValueError: Unknown type.
    """
    if kind not in READERS:
        raise ValueError(f"kind = {kind!r}; types of questions are {', '.join(READERS)}")
    return READERS[kind](text)
