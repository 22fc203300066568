"""POPE's questions: reading the published files, naming their version, building new ones.

Paper: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv
2305.10355 (EMNLP 2023). Three versions of the COCO files are in use and their scores are not
comparable (the random negatives differ), so the version is part of a result's name:

* ``coco-2023-11``: the current files, 3,000 questions a split; the default.
* ``coco-2023-10``: one month older; only *adversarial* differs, by 57 misspelled questions.
* ``coco-legacy``: the first files, used by LLaVA's guide, OPERA and PAI; *random* has 2,910
  questions, and 144 / 44 / 58 questions ask about an "imange".

These and the authors' files about A-OKVQA and GQA ship with mmlm (`published`), except
``coco-2023-10``, which is told by its content only.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
from collections import Counter
from typing import TYPE_CHECKING, Literal, NamedTuple

from benchmarks.base import read_records
from mmlm.errors import InputError
from mmlm.language.tables import load_table

if TYPE_CHECKING:
    import random
    from collections.abc import Iterable, Sequence
    from pathlib import Path

    ObjectLists = Sequence[tuple[str, Sequence[str]]]  # (picture, its objects in order)

__all__ = [
    "KINDS",
    "TEMPLATE",
    "VERSIONS",
    "Question",
    "build_questions",
    "co_occurrence",
    "digest",
    "object_counts",
    "published",
    "read_questions",
    "recognise",
    "select_pictures",
    "write_questions",
]

Kind = Literal["random", "popular", "adversarial"]
KINDS: tuple[Kind, ...] = ("random", "popular", "adversarial")
TEMPLATE = "Is there a {} in the image?"
VERSIONS = ("coco-2023-11", "coco-legacy", "aokvqa", "gqa")
"""Versions whose files ship with mmlm; pictures of COCO val2014, or of GQA for ``gqa``."""


class Question(NamedTuple):
    """One question about one picture; the field names are those of the published files."""

    question_id: int
    image: str
    text: str
    label: Literal["yes", "no"]


# (version, split) by the first 16 hex digits of the hash of pictures, texts and labels with the
# misspelling repaired, and the number of misspelled questions.
_PUBLISHED: dict[tuple[str, int], tuple[str, str]] = {
    ("36228a74b5e9a35f", 0): ("coco-2023-11", "random"),
    ("5641e62daabe62a5", 0): ("coco-2023-11", "popular"),
    ("d95e5bca305f2021", 0): ("coco-2023-11", "adversarial"),
    # random and popular of this version are those of the next month.
    ("d95e5bca305f2021", 57): ("coco-2023-10", "adversarial"),
    ("1573f01b517a579c", 144): ("coco-legacy", "random"),
    ("5641e62daabe62a5", 44): ("coco-legacy", "popular"),
    ("d95e5bca305f2021", 58): ("coco-legacy", "adversarial"),
    ("5cc4a7443b9d4d11", 0): ("aokvqa", "random"),
    ("528d7d0ba456f5c2", 0): ("aokvqa", "popular"),
    ("37aca11a994034e6", 0): ("aokvqa", "adversarial"),
    ("21f929bb7559e141", 0): ("gqa", "random"),
    ("3368ae6d01155fbb", 0): ("gqa", "popular"),
    ("9986b29d4f61569b", 0): ("gqa", "adversarial"),
}


def read_questions(path: str | Path) -> list[Question]:
    """Reads a question file in POPE's format, plain or gzipped.

    Raises:
        InputError: If it cannot be read, a record lacks a field, a label is neither yes nor no, or
            a question_id occurs twice.
    """
    questions, seen = [], set()
    for number, record in enumerate(read_records(path), start=1):
        place = f"{path}, question {number}"
        if missing := [name for name in Question._fields if name not in record]:
            raise InputError(
                f"{place}: no {missing[0]!r}.",
                advice=f"Every question needs {', '.join(Question._fields)}.",
            )
        label = str(record["label"]).strip().lower()
        if label not in ("yes", "no"):
            raise InputError(
                f"{place}: label {record['label']!r} is neither 'yes' nor 'no'.",
                advice="Correct the label.",
            )
        if record["question_id"] in seen:
            raise InputError(
                f"{place}: question_id {record['question_id']!r} occurs twice.",
                advice="Keep one question per id.",
            )
        seen.add(record["question_id"])
        questions.append(
            Question(record["question_id"], str(record["image"]), str(record["text"]), label)
        )
    return questions


def write_questions(path: str | Path, questions: Iterable[Question]) -> None:
    """Writes questions as JSON lines, byte for byte like the official builder."""
    lines = (json.dumps(question._asdict()) + "\n" for question in questions)
    with open(path, "w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)


def recognise(questions: Sequence[Question]) -> tuple[str, str] | None:
    """Version and split of a published file, e.g. ("coco-2023-11", "random"); None for others."""
    return _PUBLISHED.get(_fingerprint(questions))


@functools.cache
def published(version: str) -> dict[Kind, tuple[Question, ...]]:
    """The authors' questions of one version, 500 pictures, by kind.

    Args:
        version: One of `VERSIONS`.

    Raises:
        InputError: If there is no such version.
    """
    if version not in VERSIONS:
        raise InputError(
            f"There is no version {version!r} of POPE's questions.",
            advice=f"There are: {', '.join(VERSIONS)}; or give question files.",
        )
    table = load_table("pope_questions.json.xz", "benchmarks")[version]
    return {
        kind: tuple(Question(number, *row) for number, row in enumerate(table[kind], start=1))
        for kind in KINDS
    }


def digest(questions: Sequence[Question]) -> str:
    """A hash of pictures, texts and labels, for run records: ``sha256:<hex>``."""
    lines = "".join(f"{q.question_id}\t{q.image}\t{q.text}\t{q.label}\n" for q in questions)
    return f"sha256:{hashlib.sha256(lines.encode()).hexdigest()}"


def select_pictures(
    pictures: ObjectLists, generator: random.Random, *, count: int = 500, negatives: int = 3
) -> list[tuple[str, Sequence[str]]]:
    """Draws the pictures to ask about among those with at least ``negatives`` objects.

    Raises:
        InputError: If there are too few of them.
    """
    usable = [(image, objects) for image, objects in pictures if len(objects) >= negatives]
    if len(usable) < count:
        raise InputError(
            f"POPE needs {count} pictures with at least {negatives} objects; there are "
            f"{len(usable)}.",
            advice=f"Ask for at most {len(usable)} pictures.",
        )
    return generator.sample(usable, count)


def build_questions(
    pictures: ObjectLists,
    kind: Kind,
    generator: random.Random,
    *,
    negatives: int = 3,
    template: str = TEMPLATE,
    compat: bool = False,
) -> list[Question]:
    """Builds the questions of one kind: per picture ``negatives`` pairs of a yes and a no.

    The i-th yes asks for the i-th object of the picture. The no after it asks for an absent object
    not yet asked for: drawn at random; the most frequent one over all pictures (popular); or the
    one that most often occurs together with the object of the yes (adversarial). When a ranking is
    exhausted, the draw is random. Ties stand in first-seen order.

    Args:
        pictures: Picture and objects in order, each with at least ``negatives`` objects.
        kind: How the absent objects are chosen.
        generator: Source of the random draws. The official files come from one stream for all
            kinds, in the order of `KINDS`.
        negatives: Pairs per picture (``sample_num`` of the official builder).
        template: Text with ``{}`` for the object, article "a".
        compat: Reproduce the official builder's article: before a vowel *every* letter "a" of the
            template becomes "an" ("... in the imange?").

    Raises:
        InputError: If a picture has too few objects, or no absent object is left to ask for.
    """
    if kind not in KINDS:
        raise ValueError(f"Unknown kind {kind!r}; there are: {', '.join(KINDS)}.")
    counts = object_counts(pictures)
    ranking = sorted(counts, key=lambda name: -counts[name]) if kind == "popular" else []
    together = co_occurrence(pictures) if kind == "adversarial" else {}
    questions: list[Question] = []
    for image, objects in pictures:
        if len(objects) < negatives:
            raise InputError(
                f"{image} has {len(objects)} objects; {negatives} are needed.",
                advice="Choose pictures with select_pictures first.",
            )
        # Everything present or asked for; the official "history" holds both kinds of question.
        taken = set(objects)
        for present in objects[:negatives]:
            candidates = together[present] if kind == "adversarial" else ranking
            absent = next((name for name in candidates if name not in taken), None)
            if absent is None:
                absent = _draw(list(counts), taken, generator, image)
            taken.add(absent)
            for name, label in ((present, "yes"), (absent, "no")):
                text = _ask(template, name, compat=compat)
                questions.append(Question(len(questions) + 1, image, text, label))
    return questions


def object_counts(pictures: ObjectLists) -> dict[str, int]:
    """How often each object is listed, in first-seen order."""
    return dict(Counter(name for _, objects in pictures for name in objects))


def co_occurrence(pictures: ObjectLists) -> dict[str, list[str]]:
    """For each object the others, most frequent companion first, ties in first-seen order."""
    counts: dict[str, Counter[str]] = {}
    for _, objects in pictures:
        for name in objects:
            counts.setdefault(name, Counter()).update(o for o in objects if o != name)
    return {name: [other for other, _ in found.most_common()] for name, found in counts.items()}


def _draw(names: list[str], taken: set[str], generator: random.Random, image: str) -> str:
    if taken.issuperset(names):
        raise InputError(
            f"{image}: every object of the data set is present or already asked for.",
            advice="Use more pictures or fewer questions per picture.",
        )
    # Drawing until it fits, not drawing from what fits: the official stream of random numbers.
    while (name := generator.choice(names)) in taken:
        pass
    return name


def _ask(template: str, name: str, *, compat: bool) -> str:
    if name[0] not in "aeiou":
        return template.format(name)
    if compat:
        return template.replace("a", "an").format(name)
    return re.sub(r"\b([Aa])(?= \{\})", r"\1n", template).format(name)


def _fingerprint(questions: Sequence[Question]) -> tuple[str, int]:
    digest = hashlib.sha256()
    for question in questions:
        text = question.text.replace("imange", "image")
        digest.update(f"{question.image}\t{text}\t{question.label}\n".encode())
    return digest.hexdigest()[:16], sum("imange" in question.text for question in questions)
