"""POPE question files about pictures of the world.

POPE asks about three classes of each picture and three that are absent. How the absent ones are
chosen gives the three kinds: at random, the most frequent of the training scenes, or those that
most often stand beside the class asked about before.

Paper: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv
2305.10355 (EMNLP 2023). Differs from the authors' builder: frequencies are counted over training
scenes, which is where the model's habits come from, instead of the pictures asked about; the
article is right; the present classes are drawn, not the first three, which would be the largest.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import NamedTuple, TypedDict

import numpy as np

from data_tools.world.categories import INDEX, NAMES
from data_tools.world.language import with_article
from data_tools.world.scenes import SPLITS, Scene, scene, stream

KINDS: tuple[str, ...] = ("random", "popular", "adversarial")
ASKED = 3
"""Present classes per picture, and as many absent ones; pictures with fewer are left out."""
COUNTED_SCENES = 4000
TEMPLATE = "Is there {} in the image?"
_POLLING_STREAM = 3


class PollQuestion(TypedDict):
    """One line of a question file; the keys are those of the published files."""

    question_id: int
    image: str
    text: str
    label: str


class Prior(NamedTuple):
    """What the training scenes teach, as rankings of class positions."""

    popular: tuple[int, ...]
    """All classes, most frequent first."""
    companions: tuple[tuple[int, ...], ...]
    """For each class the classes seen beside it, most often first."""


@cache
def training_prior(count: int = COUNTED_SCENES, seed: int = 0) -> Prior:
    """Rankings counted over unrendered training scenes; ties in the order of `CATEGORIES`."""
    present = np.zeros((count, len(NAMES)), np.int64)
    for row in range(count):
        found = scene(SPLITS["train"], seed, row, "train").classes
        present[row, [INDEX[name] for name in found]] = 1
    together = present.T @ present  # [80, 80], diagonal = frequency
    frequency = together.diagonal().copy()
    np.fill_diagonal(together, 0)
    companions = [
        tuple(c for c in np.argsort(-row, kind="stable").tolist() if row[c] > 0) for row in together
    ]
    return Prior(tuple(np.argsort(-frequency, kind="stable").tolist()), tuple(companions))


def poll(kind: str, scenes: Iterable[tuple[Scene, str]]) -> list[PollQuestion]:
    """Questions of one kind; all kinds ask about the same present classes.

    Args:
        kind: One of `KINDS`.
        scenes: Each scene with the file name of its picture.

    Returns:
        Six questions per picture with at least three classes, present and absent in turn.

    Raises:
        ValueError: Unknown kind.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(KINDS)}")
    result: list[PollQuestion] = []
    for truth, image in scenes:
        for name, label in _poll_one(kind, truth):
            result.append(
                {
                    "question_id": len(result) + 1,
                    "image": image,
                    "text": TEMPLATE.format(with_article(name)),
                    "label": label,
                }
            )
    return result


def _poll_one(kind: str, truth: Scene) -> list[tuple[str, str]]:
    present = sorted(INDEX[name] for name in truth.classes)
    if len(present) < ASKED:
        return []
    rng = stream(truth.split, truth.seed, truth.index, _POLLING_STREAM)
    asked = [present[i] for i in rng.permutation(len(present))[:ASKED].tolist()]
    shuffled = rng.permutation(len(NAMES)).tolist()
    taken = set(present)
    pairs = []
    for positive in asked:
        negative = next(c for c in _candidates(kind, positive, shuffled) if c not in taken)
        taken.add(negative)
        pairs += [(NAMES[positive], "yes"), (NAMES[negative], "no")]
    return pairs


def _candidates(kind: str, positive: int, shuffled: list[int]) -> Iterable[int]:
    """Classes in the order in which they are tried; a random order ends every list."""
    if kind == "popular":
        return training_prior().popular
    if kind == "adversarial":
        return (*training_prior().companions[positive], *shuffled)
    return shuffled
