"""Conflict samples: what the scene lets one expect, against what the picture shows.

Every sample has two pictures that differ in one class of objects: the one that is asked about, and
a donor that does not support the picture's answer. Three kinds:

* ``presence``: is a class there that is typical of the theme but absent, or a class that is not
  typical and present?
* ``caption``: a caption up to the article before its next object; the picture says the largest
  object that is not named yet, the prior the most typical one that is absent.
* ``theme``: as ``presence``, on a background of one theme with the objects of another.

Scenes have streams of their own (split "conflicts"), so none of them is in a training or a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from data_tools.world.categories import NAMES
from data_tools.world.language import (
    CAPTION_QUESTIONS,
    OPENINGS,
    SINGULARS,
    existence_question,
    noun_phrase,
    with_article,
)
from data_tools.world.scenes import Scene, WorldConfig, scene, stream, with_object, without_class
from data_tools.world.themes import BY_NAME

__all__ = ["KINDS", "Conflict", "conflict", "conflicts"]

KINDS = ("presence", "caption", "theme")
TYPICAL = 0.4
"""From this probability on a class is typical of a theme."""
SPLIT = "conflicts"
_CONFIGS = {
    # Every scene has an object that its theme does not lead one to expect.
    "presence": WorldConfig(surprise=1.0),
    "caption": WorldConfig(),
    "theme": WorldConfig(swap_themes=True),
}
_STREAM = 4
"""Appended to a scene's seed for what is asked about it."""
BACKGROUND = "in the background {article}"
NEUTRAL = "scene"
"""Stands for each word of a theme's name in a prompt without them."""


@dataclass(frozen=True)
class Conflict:
    """One sample.

    Attributes:
        kind: One of `KINDS`.
        scene: What the picture shows.
        donor: The same scene with a picture that does not support the image answer.
        question: What is asked.
        begun: How the answer begins; empty: it does not yet.
        neutral: The same without the words that name the theme; empty if there are none.
        memory: First word of the answer that the prior suggests.
        image: First word of the answer that the picture suggests.
    """

    kind: str
    scene: Scene
    donor: Scene
    question: str
    begun: str
    neutral: str
    memory: str
    image: str


def conflict(kind: str, seed: int, index: int) -> Conflict | None:
    """The sample of one scene.

    Args:
        kind: One of `KINDS`.
        seed: Seed of the scenes, not negative.
        index: Number of the scene.

    Returns:
        None if nothing in this scene can be asked so.

    Raises:
        ValueError: Unknown kind, negative seed or index.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}; kinds are {', '.join(KINDS)}")
    split = f"{SPLIT}-{kind}"
    truth = scene(_CONFIGS[kind], seed, index, split)
    rng = stream(split, seed, index, _STREAM)
    return _slot(truth, rng) if kind == "caption" else _presence(kind, truth, rng, index % 2 == 0)


def conflicts(kinds: tuple[str, ...], seed: int, first: int, count: int) -> Iterator[Conflict]:
    """The samples of ``count`` scenes of every kind, from scene ``first`` on."""
    for index in range(first, first + count):
        for kind in kinds:
            found = conflict(kind, seed, index)
            if found is not None:
                yield found


def _presence(kind: str, truth: Scene, rng: np.random.Generator, absent: bool) -> Conflict | None:
    """Asks for an expected class that is absent, or an unexpected one that is present."""
    expected = BY_NAME[truth.theme].classes
    if absent:
        names = [n for n, p in expected.items() if p >= TYPICAL and n not in truth.classes]
    else:
        names = sorted(n for n in truth.classes if n not in expected)
    if not names:
        return None
    name = names[int(rng.random() * len(names))]
    donor = with_object(truth, name, rng) if absent else without_class(truth, name)
    if donor is None or not donor.instances:
        return None
    answers = ("yes", "no") if absent else ("no", "yes")
    return Conflict(kind, truth, donor, existence_question(name), "", "", *answers)


def _slot(truth: Scene, rng: np.random.Generator) -> Conflict | None:
    """A caption that has named the largest object and is about to name the next."""
    theme = BY_NAME[truth.theme]
    areas: dict[str, list[int]] = {}
    for one in truth.instances:
        areas.setdefault(one.name, []).append(one.width * one.height)
    ordered = sorted(areas, key=lambda n: (-sum(areas[n]), NAMES.index(n)))
    seen = next((n for n in ordered[1:] if len(areas[n]) == 1 and n not in SINGULARS), None)
    if seen is None:
        return None
    article = with_article(seen).split()[0]
    likely = [
        n
        for n, p in sorted(theme.classes.items(), key=lambda item: -item[1])
        if p >= TYPICAL
        and n not in areas
        and n not in SINGULARS
        and with_article(n).split()[0] == article
        and n.split()[0] not in {present.split()[0] for present in areas}
    ]
    donor = without_class(truth, seen)
    if not likely or not donor.instances:
        return None
    opening = OPENINGS[int(rng.random() * len(OPENINGS))]
    named = noun_phrase(ordered[0], len(areas[ordered[0]]))
    question = CAPTION_QUESTIONS[int(rng.random() * len(CAPTION_QUESTIONS))]

    def begun(word: str) -> str:
        first = opening.format(a_theme=with_article(word), things=named)
        return f"{first} {BACKGROUND.format(article=article)}"

    neutral = " ".join(NEUTRAL for _ in theme.word.split())
    words = (likely[0].split()[0], seen.split()[0])
    return Conflict("caption", truth, donor, question, begun(theme.word), begun(neutral), *words)
