"""SwapMix's arithmetic: from the answers before and after the swaps to rates.

Everything is a ratio of sums of counts, so that every rate has an interval over pictures, and the
difference of two rates a paired one.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from benchmarks.base import Ratio

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.base import Direction

    Record = Mapping[str, Any]

__all__ = ["DIRECTIONS", "NEEDS", "RATIOS", "SWAPS", "row_of", "score_swapmix"]

SWAPS = ("object", "attribute", "noise", "clutter")
"""What is changed in the picture; a record holds the answers afterwards under ``<name>_swaps``."""

RATIOS = {
    "context_reliance": Ratio(("changed",), ("right",)),
    "object_reliance": Ratio(("object_changed",), ("right",)),
    "attribute_reliance": Ratio(("attribute_changed",), ("right",)),
    "accuracy": Ratio(("right",), ("questions",)),
    "effective_accuracy": Ratio(("firm",), ("questions",)),
    "noise_reliance": Ratio(("noise_changed",), ("noised",)),
    "clutter_reliance": Ratio(("clutter_changed",), ("cluttered",)),
    "excess": Ratio(("excess",), ("noised",)),
    "flip_rate": Ratio(("flip_share",), ("swapped",)),
    "noise_flip_rate": Ratio(("noise_flip_share",), ("noised",)),
    "near_flip_rate": Ratio(("near_flips",), ("near_swaps",)),
    "far_flip_rate": Ratio(("far_flips",), ("far_swaps",)),
    "swaps_per_question": Ratio(("swaps",), ("right",)),
    "other_answers": Ratio(("other_answers",), ("answers",)),
}
"""All rates. Those of the paper are over the questions that are answered rightly (``right``)."""

NEEDS = {
    "object_reliance": "object",
    "attribute_reliance": "attribute",
    "noise_reliance": "noise",
    "clutter_reliance": "clutter",
    "excess": "noise",
    "noise_flip_rate": "noise",
    "near_flip_rate": "object",
    "far_flip_rate": "object",
}
"""The change without which a rate says nothing."""

DIRECTIONS: dict[str, Direction] = {
    **dict.fromkeys(RATIOS, "lower"),
    "accuracy": "higher",
    "effective_accuracy": "higher",
    "swaps_per_question": "none",
}

_PRINTED = ("object_reliance", "attribute_reliance", "context_reliance", "accuracy")


def score_swapmix(lines: Sequence[Record]) -> dict[str, float]:
    """The authors' five numbers, and the floor that noise makes, from stored answers.

    Args:
        lines: Records of questions with ``answer`` (the truth), ``original`` (what was answered
            about the untouched picture), and lists of what was answered after each swap in
            ``object_swaps``, ``attribute_swaps``, ``noise_swaps`` and ``clutter_swaps``, each of
            which may be empty or missing. Answers are compared as they are.

    Returns:
        Rates as fractions, with ``n``, the questions that were answered rightly. Rates over none
        are NaN, also those that need a noise that was not tried. A question without any swap counts
        as unchanged.
    """
    rows = [row_of(line) for line in lines]
    sums = {name: sum(row[name] for row in rows) for name in rows[0]} if rows else {}

    def value(ratio: Ratio) -> float:
        above, below = (
            sum(sums.get(name, 0) for name in names)
            for names in (ratio.numerator, ratio.denominator)
        )
        return above / below if below else math.nan

    names = (*_PRINTED, "effective_accuracy", "noise_reliance", "excess", "flip_rate")
    return {name: float(value(RATIOS[name])) for name in names} | {"n": int(sums.get("right", 0))}


def row_of(record: Record, *, other: Any = None) -> dict[str, float]:
    """The counts of one question.

    Args:
        record: See `score_swapmix`; with ``near``, one flag for each object swap, object swaps
            are also counted by whether the new object belongs to the scene.
        other: The answer that counts as none of the expected ones.
    """
    original = record["original"]
    right = int(original == record["answer"])
    answers = {kind: list(record.get(f"{kind}_swaps", ())) for kind in SWAPS}
    flips = {kind: [a != original for a in given] for kind, given in answers.items()}
    changed = {kind: right * int(any(flags)) for kind, flags in flips.items()}
    moved = int(changed["object"] or changed["attribute"])
    context = flips["object"] + flips["attribute"]
    said = [original, *(answer for given in answers.values() for answer in given)]
    return {
        "questions": 1,
        "right": right,
        "changed": moved,
        "firm": right - moved,
        **{f"{kind}_changed": changed[kind] for kind in SWAPS},
        "excess": moved - changed["noise"] if answers["noise"] else 0,
        "swaps": right * len(context),
        "swapped": right * int(bool(context)),
        "flip_share": right * _share(context),
        "noised": right * int(bool(flips["noise"])),
        "cluttered": right * int(bool(flips["clutter"])),
        "noise_flip_share": right * _share(flips["noise"]),
        **_near_and_far(right, flips["object"], record.get("near")),
        "answers": len(said),
        "other_answers": 0 if other is None else sum(answer == other for answer in said),
    }


def _near_and_far(
    right: int, flips: Sequence[bool], near: Sequence[bool] | None
) -> dict[str, float]:
    flags = [] if near is None else list(zip(flips, near, strict=True))
    return {
        "near_swaps": right * sum(is_near for _, is_near in flags),
        "near_flips": right * sum(flip for flip, is_near in flags if is_near),
        "far_swaps": right * sum(not is_near for _, is_near in flags),
        "far_flips": right * sum(flip for flip, is_near in flags if not is_near),
    }


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
