"""Questions with the changed pictures that they are asked about again, and what a run stores."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from benchmarks.run import Item, Task
from benchmarks.stored import answer_text, check_ids, check_texts
from benchmarks.swapmix.answers import OTHER, READERS, read_answer
from benchmarks.swapmix.counts import SWAPS
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.swapmix.feature_swap import FeatureSwap
    from mmlm.images import ImageSource

    Line = Mapping[str, Any]

__all__ = ["CAPTION", "ORIGINAL", "Asked", "Group", "Variant", "grouped", "task"]

CAPTION = "caption"
"""Type of the request to describe the picture; every true word in it is a question of its own."""
ORIGINAL = "original"
_COMMAND = "mmlm bench swapmix"


@dataclass(frozen=True, slots=True)
class Variant:
    """One changed picture.

    Attributes:
        swap: What was changed, one of `SWAPS`.
        image: The picture.
        note: What became of what, for people: "dog -> cat".
        near: Whether the new object belongs to the scene; None for other changes.
        objects: Objects in the picture, sorted; needed for captions only.
        facts: Further fields of the stored line.
    """

    swap: str
    image: ImageSource
    note: str = ""
    near: bool | None = None
    objects: tuple[str, ...] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Asked:
    """One question and the pictures it is asked about.

    Attributes:
        id: Identifies the question in a run.
        kind: Its type, a key of `READERS` or `CAPTION`.
        text: What the model is asked.
        answer: The true answer in words; "" for captions.
        picture: The scene, by which the bootstrap draws.
        image: The untouched picture.
        objects: Objects in it, sorted; needed for captions only.
        variants: The changed pictures.
        skipped: Changes left out because they would have touched what the question is about.
    """

    id: str
    kind: str
    text: str
    answer: str
    picture: str
    image: ImageSource
    objects: tuple[str, ...] = ()
    variants: tuple[Variant, ...] = ()
    skipped: int = 0


@dataclass(frozen=True, slots=True)
class Group:
    """The stored answers to one question: about the untouched picture, then about each change."""

    original: Line
    swaps: tuple[Line, ...]

    @property
    def kind(self) -> str:
        """Type of the question."""
        return str(self.original["type"])

    @property
    def failed(self) -> bool:
        """Whether an answer is missing, so that the question cannot be counted."""
        return any(line.get("error") for line in (self.original, *self.swaps))

    def of(self, swap: str) -> list[Line]:
        """The answers after one kind of change."""
        return [line for line in self.swaps if line["swap"] == swap]


def task(questions: Iterable[Asked], level: str, donors: Path | None = None) -> Task:
    """The requests: every question about its picture and about each changed one.

    Args:
        questions: The questions.
        level: Where the swaps happen: "world" (in the picture) or "features"; part of the name.
        donors: For features: the file of the features of all pictures.

    Raises:
        InputError: If there is none.
        ValueError: If a type, a change or a true answer is not among those that can be scored.
    """
    items = [item for question in questions for item in _items(question, level)]
    if not items:
        raise InputError("There are no questions to ask.", advice="Ask for more pictures.")
    if donors is None:
        return Task(f"swapmix/{level}", tuple(items))
    facts = {item.request.id: item.facts for item in items}

    def methods_of(requests: Sequence[Request]) -> tuple[FeatureSwap, ...]:
        return swaps_of(facts, donors, requests)

    return Task(f"swapmix/{level}", tuple(items), methods_of=methods_of)


def swaps_of(
    facts: Mapping[str, Line], donors: Path, requests: Sequence[Request]
) -> tuple[FeatureSwap, ...]:
    """What is attached for a batch: the swap of each of its rows; nothing if no row has one.

    Args:
        facts: Fields of the stored lines, by the request's id.
        donors: The file of features.
        requests: The batch.
    """
    from benchmarks.swapmix.feature_swap import FeatureSwap

    moves = []
    for request in requests:
        fact = facts[request.id]
        old, new = fact.get("old_tokens", ()), fact.get("new_tokens", ())
        moves.append((str(fact.get("donor", "")), tuple(old), tuple(new)))
    if not any(old for _, old, _ in moves):
        return ()
    return (FeatureSwap(donors=str(donors), moves=tuple(moves)),)


def _items(asked: Asked, level: str) -> Iterable[Item]:
    common = {
        "benchmark": "swapmix",
        "level": level,
        "question_id": asked.id,
        "type": asked.kind,
        "question": asked.text,
        "picture": asked.picture,
    }
    if asked.kind == CAPTION:
        label = ""
    elif (label := read_answer(asked.kind, asked.answer)) == OTHER:
        raise ValueError(f"{asked.answer!r} is no answer to a question of the type {asked.kind!r}")
    first = {"swap": ORIGINAL, "label": label, "skipped": asked.skipped}
    yield _item(f"{asked.id}-{ORIGINAL}", asked.image, common | first, asked.objects)
    numbers: dict[str, int] = defaultdict(int)
    for one in asked.variants:
        if one.swap not in SWAPS:
            raise ValueError(f"swap = {one.swap!r}; changes are {', '.join(SWAPS)}")
        numbers[one.swap] += 1
        facts = common | {"swap": one.swap, "note": one.note, "near": one.near} | dict(one.facts)
        yield _item(f"{asked.id}-{one.swap}-{numbers[one.swap]}", one.image, facts, one.objects)


def _item(
    identifier: str, image: ImageSource, facts: Mapping[str, Any], objects: Sequence[str]
) -> Item:
    name = getattr(image, "name", "")
    seen = {"objects": list(objects)} if objects else {}
    request = Request(identifier, (image,), str(facts["question"]))
    return Item(request, {**facts, "image": name, **seen})


def grouped(lines: Sequence[Line]) -> list[Group]:
    """The stored lines of each question together, in the order of the file.

    Raises:
        InputError: If a line is of another benchmark, lacks a field, is there twice, or a question
            was not asked about its untouched picture.
    """
    check_ids(lines)
    groups: dict[str, list[Line]] = {}
    for number, line in enumerate(lines, start=1):
        check_texts(line, number, ("question_id", "type", "swap", "picture", "level"), _COMMAND)
        answer_text(line, number)
        allowed = {"type": (*READERS, CAPTION), "swap": (ORIGINAL, *SWAPS)}
        for name, values in allowed.items():
            if line[name] not in values:
                raise InputError(
                    f"Line {number} ({line['id']!r}): {name} is {line[name]!r}.",
                    advice=f"It must be one of {', '.join(values)}.",
                )
        groups.setdefault(str(line["question_id"]), []).append(line)
    found = []
    for name, members in groups.items():
        originals = [line for line in members if line["swap"] == ORIGINAL]
        if len(originals) != 1:
            raise InputError(
                f"Question {name!r} has {len(originals)} answers about its untouched picture.",
                advice="Finish the run; every question needs exactly one.",
            )
        swaps = tuple(line for line in members if line["swap"] != ORIGINAL)
        found.append(Group(originals[0], swaps))
    return found
