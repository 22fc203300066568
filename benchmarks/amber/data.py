"""AMBER's questions with their truth.

The questions ship with the package (Apache-2.0); the 1,004 pictures do not. A question is either
``generative`` (describe the picture) or a yes/no question in one of three dimensions, which an
evaluation selects by the letters of the authors' script: ``g``, ``d``, ``a`` for both, ``de``,
``da``, ``dr``.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.base import read_json
from mmlm.errors import InputError
from mmlm.language.tables import load_table

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "DIMENSIONS",
    "EVALUATIONS",
    "GENERATIVE",
    "TYPES",
    "Question",
    "questions_of",
    "read_questions",
    "shipped_questions",
]

GENERATIVE = "generative"

TYPES = {
    "discriminative-hallucination": "existence",
    "discriminative-attribute-state": "state",
    "discriminative-attribute-number": "number",
    "discriminative-attribute-action": "action",
    "discriminative-relation": "relation",
    "relation": "relation",
}
"""Type of a yes/no question in the annotations -> what it is about."""

DIMENSIONS = {
    "existence": ("existence",),
    "attribute": ("state", "number", "action"),
    "relation": ("relation",),
}
"""The three dimensions of the yes/no questions and what they consist of."""

EVALUATIONS = {
    "a": (GENERATIVE, "existence", "attribute", "relation"),
    "g": (GENERATIVE,),
    "d": ("existence", "attribute", "relation"),
    "de": ("existence",),
    "da": ("attribute",),
    "dr": ("relation",),
}
"""What the authors' ``--evaluation_type`` selects."""


class Question(NamedTuple):
    """One request of the benchmark with its truth.

    Attributes:
        id: Number in the official files, from 1.
        image: File name of the picture.
        text: What is asked.
        type: ``generative`` or a key of `TYPES`.
        label: "yes" or "no"; None for a description.
        truth: Objects in the picture, for a description.
        hallu: Objects that one might expect but that are not in it, for a description.
    """

    id: int
    image: str
    text: str
    type: str
    label: str | None = None
    truth: tuple[str, ...] = ()
    hallu: tuple[str, ...] = ()

    @property
    def dimension(self) -> str:
        """``generative`` or a key of `DIMENSIONS`."""
        aspect = TYPES.get(self.type, self.type)
        return "attribute" if aspect in DIMENSIONS["attribute"] else aspect

    def facts(self) -> dict[str, Any]:
        """What a stored line must know so that it can be scored alone."""
        known = {"question_id": self.id, "image": self.image, "question": self.text}
        if self.type == GENERATIVE:
            return known | {"type": self.type, "truth": [*self.truth], "hallu": [*self.hallu]}
        return known | {"type": self.type, "label": self.label}


@functools.cache
def shipped_questions() -> tuple[Question, ...]:
    """The 1,004 descriptions and 14,216 yes/no questions of the official files."""
    return tuple(
        _question(entry, "shipped") for entry in load_table("amber_questions.json.xz", "benchmarks")
    )


def read_questions(folder: str | Path | None = None) -> tuple[Question, ...]:
    """The questions, in the order of the query file.

    Args:
        folder: The authors' folder ``data``: ``annotations.json`` and ``query/query_all.json``
            (or ``queries.json``), plain or gzipped. Default: the copy shipped with the package.

    Raises:
        InputError: If a file is missing or unreadable, an id is missing, double or without its
            counterpart, or an entry lacks a field.
    """
    if folder is None:
        return shipped_questions()
    annotations = _entries(Path(folder), ("annotations.json",))
    queries = _entries(Path(folder), ("query/query_all.json", "query_all.json", "queries.json"))
    if annotations.keys() != queries.keys():
        lone = sorted(annotations.keys() ^ queries.keys())
        raise InputError(
            f"{folder}: {len(lone)} ids have no query or no annotation, e.g. {lone[0]}.",
            advice="Copy both files from the same version of AMBER.",
        )
    return tuple(_question(query | annotations[i], f"{folder}") for i, query in queries.items())


def questions_of(questions: Sequence[Question], evaluation: str) -> tuple[Question, ...]:
    """The questions of an evaluation, order kept.

    Raises:
        ValueError: If there is no such evaluation.
    """
    if evaluation not in EVALUATIONS:
        raise ValueError(f"Unknown evaluation {evaluation!r}; there are: {', '.join(EVALUATIONS)}.")
    return tuple(q for q in questions if q.dimension in EVALUATIONS[evaluation])


def _entries(folder: Path, names: Sequence[str]) -> dict[int, dict[str, Any]]:
    paths = [folder / (name + ending) for name in names for ending in ("", ".gz")]
    path = next((path for path in paths if path.is_file()), None)
    if path is None:
        raise InputError(
            f"{folder} holds no {' or '.join(names)}.",
            advice="Give the folder `data` of github.com/junyangwang0410/AMBER.",
        )
    entries = read_json(path)
    if not isinstance(entries, list) or not entries:
        raise InputError(f"{path} holds no list of entries.", advice="Copy the official file.")
    result: dict[int, dict[str, Any]] = {}
    for number, entry in enumerate(entries, start=1):
        identifier = entry.get("id") if isinstance(entry, dict) else None
        if type(identifier) is not int or identifier in result:
            raise InputError(
                f"{path}, entry {number}: the id {identifier!r} is missing or there twice.",
                advice="Copy the official file.",
            )
        result[identifier] = entry
    return result


def _question(entry: Mapping[str, Any], source: str) -> Question:
    kind, truth, hallu = entry.get("type"), entry.get("truth"), entry.get("hallu")
    if isinstance(entry.get("image"), str) and isinstance(entry.get("query"), str):
        if kind == GENERATIVE and isinstance(truth, list) and isinstance(hallu, list):
            return Question(
                entry["id"], entry["image"], entry["query"], kind, None, tuple(truth), tuple(hallu)
            )
        if kind in TYPES and truth in ("yes", "no"):
            return Question(entry["id"], entry["image"], entry["query"], kind, truth)
    raise InputError(
        f"{source}: entry {entry.get('id')} lacks image, query, type or truth, or has a type that "
        f"does not exist ({kind!r}).",
        advice="Copy the official files.",
    )
