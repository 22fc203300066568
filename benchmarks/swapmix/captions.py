"""Captions before and after a swap: which words leave although their object stayed.

A word of a caption is a question whose answer is its being there. The caption of the untouched
picture is right about every true object it names; after a swap of *another* object it should still
name it. Beside that, what vanishes and what appears is counted over all words of all swaps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.base import Ratio
from mmlm.language.objects import node_words

if TYPE_CHECKING:
    from collections.abc import Mapping

    from benchmarks.swapmix.questions import Group

__all__ = ["RATIOS", "WORD_COLUMNS", "word_counts", "word_questions"]

RATIOS = {
    "lost_words": Ratio(("lost",), ("named",)),
    "gained_words": Ratio(("gained",), ("words",)),
    "noise_lost_words": Ratio(("noise_lost",), ("noise_named",)),
    "noise_gained_words": Ratio(("noise_gained",), ("noise_words",)),
}
"""Shares per swap: of the named objects that are in both pictures, those that are named no more; of
the objects named afterwards, those that are in neither caption nor picture before. Then the same
where nothing but the noise of the picture changed."""

WORD_COLUMNS = tuple(
    f"{prefix}{name}" for prefix in ("", "noise_") for name in ("named", "lost", "words", "gained")
)


def word_questions(group: Group) -> list[dict[str, Any]]:
    """One record, as `score_swapmix` takes it, for each object in the untouched picture.

    Swaps of an object, and swaps that touch one, are left out of the questions about it.
    """
    named = set(node_words(group.original["text"]))
    after = {line["id"]: set(node_words(line["text"])) for line in group.swaps}
    records = []
    for word in group.original["objects"]:
        kept = [line for line in group.swaps if word not in _about(line)]
        record: dict[str, Any] = {"answer": "yes", "original": _yes(word in named)}
        for line in kept:
            key = f"{line['swap']}_swaps"
            record.setdefault(key, []).append(_yes(word in after[line["id"]]))
            if line["swap"] == "object":
                record.setdefault("near", []).append(bool(line["near"]))
        records.append(record)
    return records


def word_counts(group: Group) -> dict[str, int]:
    """The counts of `RATIOS` for one captioned picture."""
    counts = dict.fromkeys(WORD_COLUMNS, 0)
    before, there = set(node_words(group.original["text"])), set(group.original["objects"])
    for line in group.swaps:
        if line["swap"] == "clutter":
            continue
        prefix = "noise_" if line["swap"] == "noise" else ""
        for name, count in _changes(before, there, line).items():
            counts[f"{prefix}{name}"] += count
    return counts


def _changes(before: set[str], there: set[str], line: Mapping[str, Any]) -> dict[str, int]:
    now, still = set(node_words(line["text"])), set(line["objects"])
    named = before & there & still
    invented = now - still - there
    return {
        "named": len(named),
        "lost": len(named - now),
        "words": len(now),
        "gained": len(invented - before),
    }


def _about(line: Mapping[str, Any]) -> set[str]:
    """Classes that a change is not irrelevant to."""
    return {line.get("swapped"), *line.get("touched", ())}


def _yes(there: bool) -> str:
    return "yes" if there else "no"
