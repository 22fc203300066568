"""MMIR's arithmetic: from the text of an answer to its points, by the authors' rules."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = [
    "COUNT",
    "SOURCES",
    "answer_of",
    "chance",
    "extract",
    "named_ids",
    "points",
    "score_mmir",
    "source_of",
]

COUNT = 534
"""Questions of the benchmark. The authors divide by it, however many were answered."""
SOURCES = ("web", "office", "poster")
MOST_IDS = 2
"""Answers that name more are worth nothing."""


def extract(text: str, tag: str) -> str:
    """What stands in the first ``<tag>...</tag>``; "" if there is none. Case matters."""
    found = re.search(f"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return found[1] if found else ""


def named_ids(text: str) -> frozenset[int]:
    """Every run of digits as a number: "3.5" names 3 and 5, "-4" names 4, "3,3" one element."""
    return frozenset(int(digits) for digits in re.findall(r"[0-9]+", text))


def points(text: str, truth: Sequence[int]) -> float:
    """What the ids in a text are worth: 0, 0.5 or 1.

    One true element: 1 for it alone, 0.5 for it and another. Two: the half of those that are named.
    Naming nothing or more than two elements is worth nothing.
    """
    ids = named_ids(text)
    if not 1 <= len(ids) <= MOST_IDS:
        return 0.0
    hits = len(ids & set(truth))
    return hits / len(ids) if len(truth) == 1 else hits / 2


def chance(elements: int, truths: int) -> float:
    """Expected points of naming two different elements of a list at random.

    With one true element each of the two is it with 1/E, for half a point if it is: 1/E. With two,
    each of the two is one of them with 2/E, for half a point each: 2/E.
    """
    return min(1.0, truths / elements) if elements else 0.0


def source_of(name: str) -> str:
    """The kind of artefact: web, poster, or office for every other name."""
    return {"web page": "web", "poster": "poster"}.get(name, "office")


def score_mmir(
    questions: Sequence[Mapping[str, Any]],
    responses: Sequence[Mapping[str, Any]],
    *,
    judged: bool = False,
) -> dict[str, float]:
    """The authors' four numbers, as fractions.

    Args:
        questions: All questions in their order, each with its ``source``.
        responses: Each with the number ``i`` of its question, ``response`` (a text, or a list of
            which the first counts), ``gt_ans`` (true ids) and, where a judge turned words into ids,
            ``llm_ans``.
        judged: Whether ``llm_ans`` is scored (open-ended answers), and not the response.

    Returns:
        By source the points divided by its questions, answered or not; ``overall`` the points
        divided by the benchmark's 534. A source without questions is left out.

    Raises:
        ValueError: If a response is about no question, or about one that has a response.
    """
    sums: Counter[str] = Counter()
    seen: set[int] = set()
    for response in responses:
        index = response["i"]
        if not isinstance(index, int) or not 0 <= index < len(questions):
            raise ValueError(f"i = {index!r}: there are questions 0 to {len(questions) - 1}")
        if index in seen:
            raise ValueError(f"i = {index}: there are two responses to this question")
        seen.add(index)
        text = str(response["llm_ans"]) if judged else answer_of(response["response"])
        sums[source_of(questions[index]["source"])] += points(text, response["gt_ans"])
    counts = Counter(source_of(question["source"]) for question in questions)
    scores = {source: sums[source] / counts[source] for source in SOURCES if counts[source]}
    return scores | {"overall": sum(sums.values()) / COUNT}


def answer_of(response: str | Sequence[str]) -> str:
    """The answer in a response: what stands between ``<ans>`` and ``</ans>``."""
    text = response if isinstance(response, str) else (response[0] if response else "")
    return extract(text, "ans").strip()
