"""How much a wrong answer differs from the right one: in length and in letters."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

__all__ = ["edit_distance", "length_ratio", "levenshtein", "plain"]


def length_ratio(rejected: str, chosen: str) -> float | None:
    """Words of one text per word of the other; None if either has none."""
    words, others = len(rejected.split()), len(chosen.split())
    return words / others if words and others else None


def edit_distance(rejected: str, chosen: str) -> float:
    """Levenshtein distance over the greater length, in lower case without blanks around.

    Returns:
        From 0 (equal) to 1 (nothing in common); 0 for two empty texts.
    """
    one, other = plain(rejected), plain(chosen)
    return levenshtein(one, other) / max(len(one), len(other), 1)


def plain(text: str) -> str:
    """A text as the edit distance sees it: in lower case, without blanks around."""
    return text.strip().lower()


def levenshtein(one: Sequence[str], other: Sequence[str]) -> int:
    """Least number of insertions, deletions and replacements that make one text the other."""
    if len(one) < len(other):
        one, other = other, one
    letters = np.array([ord(letter) for letter in other], dtype=np.int64)
    places = np.arange(len(letters) + 1)
    row = places.copy()
    for letter in one:
        best = np.empty_like(row)
        best[0] = row[0] + 1
        np.minimum(row[1:] + 1, row[:-1] + (letters != ord(letter)), out=best[1:])
        # Insertions run along the row: the least of best[k] + (j - k) over all k <= j.
        row = np.minimum.accumulate(best - places) + places
    return int(row[-1])
