"""What is said about a scene: captions, questions, and the vocabulary of both.

Sentences are lower case, words and punctuation separated by single blanks. A conversation reads

    user : <image> QUESTION assistant : ANSWER <eos> user : QUESTION assistant : ANSWER <eos>

No fixed word is in CHAIR's synonym list, so only the named classes count as objects.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from string import Formatter

import numpy as np

from data_tools.world.categories import INDEX, NAMES
from data_tools.world.scenes import Instance, Scene
from data_tools.world.themes import BY_NAME, THEMES, Theme

CAPTION_QUESTIONS: tuple[str, ...] = (
    "describe the image .",
    "describe the image in detail .",
    "what is shown in the image ?",
    "please describe this image in detail .",
    "please help me describe the image in detail .",
)
"""The last two are the prompts with which CHAIR is usually measured (OPERA's and PAI's code)."""

NUMBERS = ("one", "two", "three")
PLURALS = {
    "person": "people",
    "bus": "buses",
    "bench": "benches",
    "sheep": "sheep",
    "skis": "pairs of skis",
    "wine glass": "wine glasses",
    "knife": "knives",
    "sandwich": "sandwiches",
    "broccoli": "pieces of broccoli",
    "couch": "couches",
    "mouse": "mice",
    "toothbrush": "toothbrushes",
    "scissors": "pairs of scissors",
}
"""Plurals that are not formed with a plain "s"."""
SINGULARS = {
    "skis": "pair of skis",
    "scissors": "pair of scissors",
    "broccoli": "piece of broccoli",
}
"""Classes that "a" cannot stand before."""
VOWELS = "aeiou"

# Probabilities of the grammar.
TWO_IN_OPENING = 0.6
PAIRED = 0.35
ON_A_SIDE = 0.30
RELATED = 0.45
CLOSING = 0.5
NOISE_POWER = 1.5
"""Label noise draws an absent class with weight (its probability in the theme) ** this power."""
EXISTENCE, COUNTING = 0.70, 0.15
"""Shares of the kinds of questions; the rest asks for a relation."""
PRESENT = 0.5

OPENINGS = (
    "the image shows {a_theme} scene with {things} .",
    "the image features {things} in {a_theme} .",
)
CLOSINGS = (
    "overall it looks like a typical {theme} .",
    "the {theme} looks calm and tidy .",
    "the scene suggests a busy moment in the {theme} .",
)
PAIRS = ("there {verb} also {things} in the scene .", "{things} can be seen near the {previous} .")
SEVERAL = ("there are {things} in the scene .", "{things} can be seen in the image .")
SIDES = (
    "there is {thing} on the left side .",
    "there is {thing} in the middle .",
    "there is {thing} on the right side .",
)
RELATION = "{thing} is {relation} the {previous} ."
RELATIONS = ("to the left of", "to the right of", "above", "below")
BACKGROUND = "in the background {thing} can be seen ."
NOISE = (BACKGROUND, "there is also {thing} in the scene .")
ASK_EXISTENCE = "is there {thing} in the image ?"
YES = "yes , there is {thing} in the image ."
NO = "no , there is no {thing} in the image ."
ASK_COUNT = "how many {things} are there ?"
ASK_RELATION = "where is the {thing} relative to the {other} ?"
ANSWER_RELATION = "{relation} the {other}"
CONVERSATION = ("user", "assistant", ":")


def with_article(text: str) -> str:
    """`a dog`, `an apple`."""
    return f"{'an' if text[0] in VOWELS else 'a'} {text}"


def singular(name: str) -> str:
    """How one object of a class is called: mostly its name."""
    return SINGULARS.get(name, name)


def plural(name: str) -> str:
    """How several objects of a class are called."""
    return PLURALS.get(name, name + "s")


def noun_phrase(name: str, count: int) -> str:
    """`a dog`, `two dogs`."""
    return with_article(singular(name)) if count == 1 else f"{NUMBERS[count - 1]} {plural(name)}"


def existence_question(name: str) -> str:
    """POPE's question in the world's words; it names the class bare, as POPE does."""
    return ASK_EXISTENCE.format(thing=with_article(name))


def existence_answer(name: str, present: bool) -> str:
    """The answer to `existence_question`."""
    if present:
        return YES.format(thing=with_article(singular(name)))
    return NO.format(thing=name)


class _Group:
    """All instances of one class in a scene."""

    def __init__(self, category: int, instances: Sequence[Instance]) -> None:
        self.name = NAMES[category]
        self.count = len(instances)
        self.area = sum(i.width * i.height for i in instances)
        self.x = sum(i.centre[0] for i in instances) / self.count
        self.y = sum(i.centre[1] for i in instances) / self.count

    @property
    def phrase(self) -> str:
        return noun_phrase(self.name, self.count)

    @property
    def definite(self) -> str:
        return singular(self.name) if self.count == 1 else plural(self.name)


def _groups(scene: Scene) -> list[_Group]:
    """Classes of a scene, largest total area first."""
    members: dict[int, list[Instance]] = {}
    for instance in scene.instances:
        members.setdefault(instance.category, []).append(instance)
    groups = [_Group(category, instances) for category, instances in members.items()]
    return sorted(groups, key=lambda g: (-g.area, INDEX[g.name]))


def _pick(rng: np.random.Generator, options: Sequence[str]) -> str:
    return options[int(rng.random() * len(options))]


def relation(subject: tuple[float, float], other: tuple[float, float]) -> str:
    """Where the subject is as seen from the other: the axis on which they are further apart."""
    dx, dy = subject[0] - other[0], subject[1] - other[1]
    if abs(dx) >= abs(dy):
        return RELATIONS[0] if dx < 0 else RELATIONS[1]
    return RELATIONS[2] if dy < 0 else RELATIONS[3]


def caption(scene: Scene, rng: np.random.Generator) -> str:
    """One description that names every class of the scene once, largest first.

    Args:
        scene: What to describe; `scene.config.label_noise` is the probability of one sentence
            about an absent class of the theme, from the third sentence on if there are two true
            ones, before the closing.
        rng: Chooses the sentence forms.
    """
    groups = _groups(scene)
    theme = BY_NAME[scene.theme]
    opening = 2 if rng.random() < TWO_IN_OPENING else 1
    things = " and ".join(g.phrase for g in groups[:opening])
    sentences = [
        _pick(rng, OPENINGS).format(a_theme=with_article(theme.word), things=things),
        *_middle(groups, opening, scene.config.size, rng),
    ]
    if scene.config.label_noise and rng.random() < scene.config.label_noise:
        extra = _noise_sentence(scene, theme, rng)
        if extra:
            at = 2 + int(rng.random() * max(1, len(sentences) - 1))
            sentences.insert(at, extra)
    if rng.random() < CLOSING:
        sentences.append(_pick(rng, CLOSINGS).format(theme=theme.word))
    return " ".join(sentences)


def _middle(groups: list[_Group], start: int, size: int, rng: np.random.Generator) -> list[str]:
    """Sentences about the classes that the opening left over."""
    sentences = []
    i = start
    while i < len(groups):
        group, previous = groups[i], groups[i - 1].definite
        if i + 1 < len(groups) and rng.random() < PAIRED:
            both = f"{group.phrase} and {groups[i + 1].phrase}"
            verb = "is" if group.count == 1 else "are"
            sentences.append(_pick(rng, PAIRS).format(verb=verb, things=both, previous=previous))
            i += 2
            continue
        if group.count > 1:
            sentences.append(_pick(rng, SEVERAL).format(things=group.phrase))
        else:
            sentences.append(_place_sentence(group, groups[i - 1], size, rng))
        i += 1
    return sentences


def _place_sentence(group: _Group, previous: _Group, size: int, rng: np.random.Generator) -> str:
    """A sentence about a single object: its side, its relation to the last one, or neither."""
    draw = rng.random()
    if draw < ON_A_SIDE:
        return SIDES[min(2, int(3 * group.x / size))].format(thing=group.phrase)
    if draw < ON_A_SIDE + RELATED:
        where = relation((group.x, group.y), (previous.x, previous.y))
        return RELATION.format(thing=group.phrase, relation=where, previous=previous.definite)
    return BACKGROUND.format(thing=group.phrase)


def _noise_sentence(scene: Scene, theme: Theme, rng: np.random.Generator) -> str:
    """A sentence about an absent class of the theme; empty if all its classes are present."""
    absent = [name for name in theme.classes if name not in scene.classes]
    if not absent:
        return ""
    weights = np.cumsum([theme.classes[name] ** NOISE_POWER for name in absent])
    name = absent[int(np.searchsorted(weights, rng.random() * weights[-1], side="right"))]
    return _pick(rng, NOISE).format(thing=noun_phrase(name, 1))


def questions(scene: Scene, rng: np.random.Generator, n: int = 5) -> list[tuple[str, str]]:
    """Different questions about a scene with their answers.

    70 % ask whether a class is there (half of them for a present one; an absent one is drawn from
    all absent classes, so that agreeing with the theme is a shortcut, as in real instruction
    data), 15 % how many there are, 15 % where one is. A scene without two single objects has no
    question of the last kind; it gets one about existence.

    Args:
        scene: What to ask about.
        rng: Chooses the questions.
        n: How many, from 1 to 40.

    Raises:
        ValueError: n out of range.
    """
    if not 1 <= n <= len(NAMES) // 2:
        raise ValueError(f"n = {n}; ask for 1 to {len(NAMES) // 2} questions")
    groups = _groups(scene)
    absent = [name for name in NAMES if name not in scene.classes]
    asked: dict[str, str] = {}
    while len(asked) < n:
        question, answer = _question(groups, absent, rng)
        asked.setdefault(question, answer)
    return list(asked.items())


def _question(groups: list[_Group], absent: list[str], rng: np.random.Generator) -> tuple[str, str]:
    kind = rng.random()
    singles = [g for g in groups if g.count == 1]
    if kind >= EXISTENCE + COUNTING and len(singles) > 1:
        first = int(rng.random() * len(singles))
        second = (first + 1 + int(rng.random() * (len(singles) - 1))) % len(singles)
        one, other = singles[first], singles[second]
        where = relation((one.x, one.y), (other.x, other.y))
        return (
            ASK_RELATION.format(thing=one.definite, other=other.definite),
            ANSWER_RELATION.format(relation=where, other=other.definite),
        )
    if EXISTENCE <= kind < EXISTENCE + COUNTING:
        group = groups[int(rng.random() * len(groups))]
        return ASK_COUNT.format(things=plural(group.name)), NUMBERS[group.count - 1]
    present = rng.random() < PRESENT
    name = groups[int(rng.random() * len(groups))].name if present else _pick(rng, absent)
    return existence_question(name), existence_answer(name, present)


def fixed_phrases() -> tuple[str, ...]:
    """Every fixed text of the grammar, placeholders removed, and every theme word."""
    templates = (
        *CAPTION_QUESTIONS, *OPENINGS, *CLOSINGS, *PAIRS, *SEVERAL, *SIDES, RELATION, *RELATIONS,
        *NOISE, ASK_EXISTENCE, YES, NO, ASK_COUNT, ASK_RELATION, ANSWER_RELATION,
    )  # fmt: skip
    texts = ["".join(literal for literal, *_ in Formatter().parse(t)) for t in templates]
    words = [theme.word for theme in THEMES]
    return tuple(" ".join(t.split()) for t in (*texts, *words, *NUMBERS, "a", "an", "is", "are"))


@cache
def _vocabulary() -> tuple[str, ...]:
    texts = [*fixed_phrases(), *CONVERSATION]
    for name in NAMES:
        texts += [name, singular(name), plural(name)]
    return tuple(sorted({word for text in texts for word in text.split()}))


def vocabulary() -> list[str]:
    """All words of captions, questions, answers and conversations, sorted; no special tokens."""
    return list(_vocabulary())
