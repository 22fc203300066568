"""What AMBER counts in each answer, and the metrics on the sums of these counts."""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.amber.data import DIMENSIONS, GENERATIVE, TYPES
from benchmarks.base import Direction, Ratio

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from benchmarks.amber.data import Question
    from benchmarks.amber.words import Description

__all__ = ["ASPECTS", "directions", "ratios", "row"]

ASPECTS = tuple(dict.fromkeys(TYPES.values()))
_GENERATIVE_COUNTS = (
    "descriptions",
    "hallucinated",
    "nouns",
    "invented",
    "grounded",
    "objects",
    "covered",
    "expected",
    "cognitive",
)
_ANSWER_COUNTS = ("asked", "correct", "no_labels", "said_no", "said_no_right", "neither")


def row(question: Question, said: str | None, seen: Description | None) -> dict[str, int]:
    """The counts of one answer.

    Args:
        question: What was asked.
        said: "yes", "no", or None if the answer is neither.
        seen: What a description says; None for a yes/no question.
    """
    counts = dict.fromkeys(_GENERATIVE_COUNTS, 0)
    counts |= {f"{aspect}.{name}": 0 for aspect in ASPECTS for name in _ANSWER_COUNTS}
    if seen is not None:
        invented = sum(seen.invented)
        return counts | {
            "descriptions": 1,
            "hallucinated": int(invented > 0),
            "nouns": len(seen.nouns),
            "invented": invented,
            "grounded": len(seen.nouns) - invented,
            "objects": len(seen.covered),
            "covered": sum(seen.covered),
            "expected": len(seen.cognitive),
            "cognitive": sum(seen.cognitive),
        }
    denied, label = said == "no", question.label
    flags = {
        "asked": True,
        "correct": said == label,
        "no_labels": label == "no",
        "said_no": denied,
        "said_no_right": denied and label == "no",
        "neither": said is None,
    }
    aspect = TYPES[question.type]
    return counts | {f"{aspect}.{name}": int(value) for name, value in flags.items()}


def ratios(parts: set[str]) -> dict[str, Ratio | tuple[Ratio, ...]]:
    """The metrics of the parts there are (`Question.dimension`), the headline first."""
    found: dict[str, Ratio] = {}
    asked = [name for name in DIMENSIONS if name in parts]
    if GENERATIVE in parts:
        found |= {
            "chair": Ratio(("invented",), ("nouns",)),
            "cover": Ratio(("covered",), ("objects",)),
            "hal": Ratio(("hallucinated",), ("descriptions",)),
            "cog": Ratio(("cognitive",), ("expected",)),
        }
    if len(asked) > 1:
        found |= _answer_ratios("", tuple(a for name in asked for a in DIMENSIONS[name]))
    for name in asked:
        found |= _answer_ratios(f"{name}_", DIMENSIONS[name])
        if len(DIMENSIONS[name]) > 1:
            for aspect in DIMENSIONS[name]:
                found |= _answer_ratios(f"{aspect}_", (aspect,))
    if asked:
        aspects = tuple(aspect for name in asked for aspect in DIMENSIONS[name])
        found["neither"] = Ratio(
            tuple(f"{aspect}.neither" for aspect in aspects),
            tuple(f"{aspect}.asked" for aspect in aspects),
        )
    if "chair" in found and (f1 := found.get("f1")) is not None:
        # The mean of the share of nouns that are not invented and the F1 of all questions.
        score: dict[str, Ratio | tuple[Ratio, ...]] = {
            "amber_score": (Ratio(("grounded",), ("nouns",)), f1)
        }
        return score | found
    return dict(found)


def _answer_ratios(prefix: str, aspects: Sequence[str]) -> dict[str, Ratio]:
    def columns(name: str) -> tuple[str, ...]:
        return tuple(f"{aspect}.{name}" for aspect in aspects)

    right, said, labels = (columns(name) for name in ("said_no_right", "said_no", "no_labels"))
    return {
        f"{prefix}accuracy": Ratio(columns("correct"), columns("asked")),
        f"{prefix}precision": Ratio(right, said),
        f"{prefix}recall": Ratio(right, labels),
        f"{prefix}f1": Ratio(right, said + labels, 2.0, needs=right),
    }


def directions(metrics: Iterable[str]) -> dict[str, Direction]:
    """Which way each metric is better."""
    lower = ("chair", "hal", "cog", "neither")
    return {name: "lower" if name in lower else "higher" for name in metrics}
