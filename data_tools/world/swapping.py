"""Swapping one object of a scene for another, everything else equal, down to the noise.

    asked = swap_questions(truth)[0]
    for one in draw_swaps(truth, asked, "object", 5).swaps:
        picture = render(one.scene)         # only pixels under the old and the new object differ

Paper: Gupta et al., "SwapMix: Diagnosing and Regularizing the Over-Reliance on Visual Context in
Visual Question Answering", arXiv 2204.02285 (CVPR 2022). There features of detected boxes are
replaced; here the picture is painted again, so that nothing of the old object is left. Objects are
known by their number, not by their name: a second dog can be irrelevant only if the question is not
about dogs. Whether the truth stayed is computed, not assumed.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from data_tools.world.categories import INDEX, NAMES, size_group
from data_tools.world.language import (
    ASK_COUNT,
    ASK_RELATION,
    CAPTION_QUESTIONS,
    NUMBERS,
    existence_question,
    plural,
    relation,
    singular,
)
from data_tools.world.scenes import Instance, Scene, stream
from data_tools.world.sprites import boxes, sprite
from data_tools.world.themes import theme_classes

__all__ = [
    "Drawn",
    "Replacement",
    "Swap",
    "SwapQuestion",
    "draw_swaps",
    "painted",
    "swap",
    "swap_questions",
    "truth_of",
]

RESIZED = 0.25
"""An attribute swap makes the object larger or smaller by this part of its side."""

Kind = Literal["existence", "count", "relation", "caption"]
_QUESTION_STREAM, _SWAP_STREAM = 7, 8
_SWAP_NUMBER = {"object": 1, "attribute": 2}


class SwapQuestion(NamedTuple):
    """A question about a scene, and the classes it is about."""

    kind: Kind
    subjects: tuple[str, ...]
    """Classes whose objects must stay; none for a caption, which is about all and none of them."""
    text: str


class Replacement(NamedTuple):
    """What stands in an object's place."""

    category: int
    picture: int
    flip: bool
    scale: float = 1.0
    """Its long side, as a multiple of the old object's."""


class Swap(NamedTuple):
    """A scene with one object replaced."""

    scene: Scene
    instance: int
    """Which object, as its number in `Scene.instances`."""
    old: str
    new: str
    near: bool | None
    """Whether the new class usually stands in the theme; None if the class stayed."""
    touched: tuple[str, ...]
    """Classes of other objects in whose boxes pixels changed, sorted."""


class Drawn(NamedTuple):
    """The swaps of one kind for a question."""

    swaps: tuple[Swap, ...]
    skipped: int
    """Swaps left out because old or new object touches what the question is about."""


def truth_of(scene: Scene, question: SwapQuestion) -> str:
    """The right answer in the world's words; of a caption the classes that it should name."""
    found = [i for i in scene.instances if i.name in question.subjects]
    if question.kind == "existence":
        return "yes" if found else "no"
    if question.kind == "count":
        return NUMBERS[len(found) - 1] if found else "zero"
    if question.kind == "relation":
        one, other = (
            next(i for i in found if i.name == subject).centre for subject in question.subjects
        )
        return relation(one, other)
    return ", ".join(sorted(scene.classes))


def swap_questions(scene: Scene) -> list[SwapQuestion]:
    """The questions about a scene: the same for the same scene, whoever asks.

    Whether something is there, for a present class and for an absent one of the theme (what the
    surroundings suggest); how many of a class there are; where one single object is relative to
    another, if there are two; and a caption.
    """
    rng = stream(scene.split, scene.seed, scene.index, _QUESTION_STREAM)
    present = sorted(scene.classes, key=INDEX.__getitem__)
    absent = [name for name in NAMES if name not in scene.classes]
    expected = [name for name in absent if name in theme_classes(scene.theme)] or absent
    names = [_pick(rng, present), _pick(rng, expected)]
    questions = [SwapQuestion("existence", (name,), existence_question(name)) for name in names]
    counted = _pick(rng, present)
    text = ASK_COUNT.format(things=plural(counted))
    questions.append(SwapQuestion("count", (counted,), text))
    singles = [n for n in present if sum(i.name == n for i in scene.instances) == 1]
    if len(singles) > 1:
        one, other = (singles[i] for i in rng.permutation(len(singles))[:2].tolist())
        text = ASK_RELATION.format(thing=singular(one), other=singular(other))
        questions.append(SwapQuestion("relation", (one, other), text))
    return [*questions, SwapQuestion("caption", (), CAPTION_QUESTIONS[1])]


def swap(scene: Scene, instance: int, by: Replacement) -> Scene:
    """The scene with one object replaced: same centre, same long side, same place in the order.

    A wider or taller object that would leave the picture is moved inside.

    Args:
        scene: The scene.
        instance: Which object, as its number in `scene.instances`.
        by: What takes its place.

    Raises:
        ValueError: There is no such object, class or picture, or the scale is not positive.
    """
    if not 0 <= instance < len(scene.instances):
        raise ValueError(f"instance = {instance}; the scene has {len(scene.instances)}")
    if not 0 <= by.category < len(NAMES):
        raise ValueError(f"category = {by.category}; give a number from 0 to {len(NAMES) - 1}")
    pictures = boxes(scene.style)[by.category]
    if not 0 <= by.picture < len(pictures):
        raise ValueError(f"picture = {by.picture}; {NAMES[by.category]} has {len(pictures)}")
    if not 0 < by.scale < float("inf"):
        raise ValueError(f"scale = {by.scale}; it must be above 0")
    old = scene.instances[instance]
    _, _, w, h = pictures[by.picture]
    ratio = max(old.width, old.height) * by.scale / max(w, h)
    width, height = (min(scene.config.size, max(1, round(side * ratio))) for side in (w, h))
    x, y = old.centre
    left = _inside(x - width / 2, width, scene.config.size)
    top = _inside(y - height / 2, height, scene.config.size)
    new = Instance(by.category, by.picture, left, top, width, height, by.flip)
    instances = (*scene.instances[:instance], new, *scene.instances[instance + 1 :])
    return replace(scene, instances=instances)


def painted(scene: Scene, instance: int) -> NDArray[np.bool_]:
    """The pixels [S, S] on which an object's sprite puts any colour, whoever covers it."""
    one = scene.instances[instance]
    _, transparency, _ = sprite(scene.style, one.category, one.picture, one.width, one.height)
    mask = np.zeros((scene.config.size, scene.config.size), bool)
    touched = transparency[..., 0] < 1
    touched = touched[:, ::-1] if one.flip else touched
    mask[one.y : one.y + one.height, one.x : one.x + one.width] = touched
    return mask


def draw_swaps(
    scene: Scene, question: SwapQuestion, kind: Literal["object", "attribute"], count: int = 5
) -> Drawn:
    """Swaps of every object that a question is not about; the same for the same arguments.

    An object swap puts a class of the same size group in an object's place that is not in the
    scene and not asked for: in turn one that belongs to the theme ("near") and one that does not
    ("far"). An attribute swap keeps the class: another of its pictures, mirrored, larger, smaller.

    Args:
        scene: The scene.
        question: The question.
        kind: What is exchanged.
        count: Swaps per object, at least 1; fewer where there are not so many.

    Raises:
        ValueError: Unknown kind, or a count below 1.
        RuntimeError: A swap changed the truth of the question: an error of the world.
    """
    if kind not in _SWAP_NUMBER or count < 1:
        raise ValueError(f"kind = {kind!r}, count = {count}; give object or attribute, at least 1")
    swaps, skipped = [], 0
    for number, instance in enumerate(scene.instances):
        if instance.name in question.subjects:
            continue
        more = (_SWAP_STREAM, _SWAP_NUMBER[kind], number, *(INDEX[s] for s in question.subjects))
        rng = stream(scene.split, scene.seed, scene.index, *more)
        draw = _other_classes if kind == "object" else _other_looks
        for by, near in draw(rng, scene, question, number, count):
            new = swap(scene, number, by)
            touched = _touched(scene, new, number)
            if set(touched) & set(question.subjects):
                skipped += 1
                continue
            _check_truth(scene, new, number, question)
            swaps.append(Swap(new, number, instance.name, NAMES[by.category], near, touched))
    return Drawn(tuple(swaps), skipped)


def _other_classes(
    rng: np.random.Generator, scene: Scene, question: SwapQuestion, number: int, count: int
) -> list[tuple[Replacement, bool | None]]:
    old = scene.instances[number]
    barred = scene.classes | set(question.subjects)
    group = [n for n in NAMES if n not in barred and size_group(n) == size_group(old.name)]
    theme = theme_classes(scene.theme)
    near = [n for n in group if n in theme]
    far = [n for n in group if n not in theme]
    chosen: list[tuple[Replacement, bool | None]] = []
    for names, most in ((near, (count + 1) // 2), (far, count // 2)):
        for index in rng.permutation(len(names))[:most].tolist():
            category = INDEX[names[index]]
            picture = int(rng.random() * len(boxes(scene.style)[category]))
            chosen.append((Replacement(category, picture, old.flip), names is near))
    return chosen


def _other_looks(
    rng: np.random.Generator, scene: Scene, question: SwapQuestion, number: int, count: int
) -> list[tuple[Replacement, bool | None]]:
    old = scene.instances[number]
    pictures = range(len(boxes(scene.style)[old.category]))
    same = Replacement(old.category, old.picture, old.flip)
    options = [
        *(same._replace(picture=picture) for picture in pictures if picture != old.picture),
        same._replace(flip=not old.flip),
        same._replace(scale=1 + RESIZED),
        same._replace(scale=1 - RESIZED),
    ]
    order = rng.permutation(len(options))[:count].tolist()
    return [(options[index], None) for index in order]


def _touched(old: Scene, new: Scene, instance: int) -> tuple[str, ...]:
    """Classes of other objects in whose boxes pixels of the old or the new one lie."""
    mask = painted(old, instance) | painted(new, instance)
    found = {
        i.name
        for number, i in enumerate(old.instances)
        if number != instance and mask[i.y : i.y + i.height, i.x : i.x + i.width].any()
    }
    return tuple(sorted(found))


def _check_truth(old: Scene, new: Scene, instance: int, question: SwapQuestion) -> None:
    if question.kind == "caption":
        return
    before, after = truth_of(old, question), truth_of(new, question)
    if before != after:
        raise RuntimeError(
            f"Swapping object {instance} of scene {old.index} (split {old.split}, seed "
            f"{old.seed}) changed the answer to {question.text!r} from {before!r} to {after!r}."
        )


def _inside(start: float, length: int, size: int) -> int:
    return min(max(0, round(start)), size - length)


def _pick(rng: np.random.Generator, names: list[str]) -> str:
    return names[int(rng.random() * len(names))]
