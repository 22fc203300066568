"""What the authors' script of AMBER prints: its spelling, its rounding, its small constants.

Every value is a percentage with one decimal. F1 is computed from the *rounded* precision and
recall with a constant in the denominator that is ten times larger for existence; all other
denominators start at 0.001, so that an empty group gives 0.0 instead of a division by zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from benchmarks.amber.data import DIMENSIONS, EVALUATIONS, GENERATIVE

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["Printed", "amber_score", "printed"]

Printed = dict[str, dict[str, float]]

_GENERATIVE_TITLE = "Generative Task"
_ALL_TITLE = "Descriminative Task"
_TITLES = {"existence": "Exsitence", "attribute": "Attribute", "relation": "Relation"}
_START = 0.001


def printed(counts: Mapping[str, int], evaluation: str) -> Printed:
    """The values of an evaluation by group and name.

    Args:
        counts: Sums of the columns of `benchmarks.amber`.
        evaluation: A key of `amber_data.EVALUATIONS`.
    """
    parts = EVALUATIONS[evaluation]
    result: Printed = {}
    if GENERATIVE in parts:
        result[_GENERATIVE_TITLE] = _generative(counts)
    asked = [name for name in DIMENSIONS if name in parts]
    if len(asked) == len(DIMENSIONS):
        # One counter for all questions, hence one 0.001 and not one per aspect.
        everything = [aspect for name in asked for aspect in DIMENSIONS[name]]
        result[_ALL_TITLE] = _answers(counts, everything, start=_START)
    for name in asked:
        aspects = DIMENSIONS[name]
        result[_TITLES[name]] = _answers(
            counts,
            aspects,
            start=_START * len(aspects),
            epsilon=0.001 if name == "existence" else 0.0001,
        )
        if len(aspects) > 1:
            for aspect in aspects:
                result[aspect.capitalize()] = _answers(counts, [aspect], start=_START)
    return result


def amber_score(values: Printed) -> float | None:
    """((100 - CHAIR) + F1) / 2 of the printed values; None unless both tasks are there."""
    if _GENERATIVE_TITLE not in values or _ALL_TITLE not in values:
        return None
    return (100 - values[_GENERATIVE_TITLE]["CHAIR"] + values[_ALL_TITLE]["F1"]) / 2


def _generative(counts: Mapping[str, int]) -> dict[str, float]:
    clean = counts["descriptions"] - counts["hallucinated"]
    return {
        "CHAIR": _percent(counts["invented"], counts["nouns"]),
        "Cover": _percent(counts["covered"], counts["objects"]),
        "Hal": round(100 - clean / (_START + counts["descriptions"]) * 100, 1),
        "Cog": _percent(counts["cognitive"], counts["expected"]),
    }


def _answers(
    counts: Mapping[str, int], aspects: Sequence[str], *, start: float, epsilon: float = 0.0001
) -> dict[str, float]:
    def total(name: str) -> int:
        return sum(counts[f"{aspect}.{name}"] for aspect in aspects)

    precision = _percent(total("said_no_right"), total("said_no"), start)
    recall = _percent(total("said_no_right"), total("no_labels"), start)
    p, r = precision / 100, recall / 100
    return {
        "Accuracy": _percent(total("correct"), total("asked"), start),
        "Precision": precision,
        "Recall": recall,
        "F1": round(2 * p * r / (p + r + epsilon) * 100, 1),
    }


def _percent(part: int, whole: int, start: float = _START) -> float:
    # The script adds 1 to 0.001 again and again; we add once. The two sums differ by less than
    # 2e-8 for 15,220 questions, and no quotient part / (whole + 0.001) or / (whole + 0.003) comes
    # nearer than 1e-9 of a per cent to where rounding flips, so the printed value is the same.
    return round(part / (start + whole) * 100, 1)
