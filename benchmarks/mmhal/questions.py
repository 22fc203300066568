"""MMHal-Bench's questions and pictures, and what stored answers to them must look like."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_records
from benchmarks.run import Item, Task
from benchmarks.stored import answer_text, check_ids, check_texts
from mmlm.errors import InputError
from mmlm.language.tables import load_table
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["COUNT", "TYPES", "Question", "check_lines", "find_pictures", "read_questions", "task"]

TYPES = (
    *("attribute", "adversarial", "comparison", "counting"),
    *("relation", "environment", "holistic", "other"),
)
"""Question types in the official order: question i is of type i mod 8."""

COUNT = 96
_TEXTS = ("image", "question_type", "objects", "question", "reference")
_SOURCE = "mmlm bench mmhal"
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


@dataclass(frozen=True, slots=True)
class Question:
    """One question.

    Attributes:
        index: Place in the official order, from 0; decides the type.
        type: A name in `TYPES`.
        image_id: Id of the picture in Open Images.
        address: Where the picture was published.
        objects: What the picture shows, separated by commas.
        text: The question.
        reference: A person's answer.
        topic: Kind of scene, e.g. "outdoor".
    """

    index: int
    type: str
    image_id: str
    address: str
    objects: str
    text: str
    reference: str
    topic: str = ""


def read_questions(path: Path | None = None) -> list[Question]:
    """Reads the questions.

    Args:
        path: A file in the official format (a JSON list of 96 records), plain or gzipped; by
            default the published one, which ships with this package.

    Raises:
        InputError: If the file cannot be read, has another number of questions, or their types do
            not come in the official order.
    """
    records = (
        load_table("mmhal_bench.json.xz", "benchmarks") if path is None else read_records(path)
    )
    place = "MMHal-Bench" if path is None else str(path)
    if len(records) != COUNT:
        raise InputError(
            f"{place} holds {len(records)} questions instead of {COUNT}.",
            advice="Use the official file; the type of a question depends on its place.",
        )
    return [_question(record, i, place) for i, record in enumerate(records)]


def _question(record: Mapping[str, Any], index: int, place: str) -> Question:
    names = ("question_type", "image_id", "image_src", "question", "gt_answer")
    missing = [name for name in names if not isinstance(record.get(name), str)]
    objects = record.get("image_content")
    if missing or not isinstance(objects, list):
        raise InputError(
            f"{place}, entry {index + 1} has no {(missing or ['image_content'])[0]!r}.",
            advice="Use the official file.",
        )
    if record["question_type"] != TYPES[index % len(TYPES)]:
        raise InputError(
            f"{place}, entry {index + 1} is of type {record['question_type']!r}, expected "
            f"{TYPES[index % len(TYPES)]!r}.",
            advice="Keep the official order; the type of a question depends on its place.",
        )
    kind, image_id, address, text, reference = (record[name] for name in names)
    return Question(
        index,
        kind,
        image_id,
        address,
        ", ".join(map(str, objects)),
        text,
        reference,
        str(record.get("question_topic", "")),
    )


def find_pictures(questions: Sequence[Question], folder: Path) -> list[Path]:
    """Finds the picture of each question by its published file name or its Open Images id.

    Raises:
        InputError: If some are missing; says how many.
    """
    found: list[Path | None] = []
    for question in questions:
        names = [question.address.rpartition("/")[2]]
        names += [question.image_id + suffix for suffix in _SUFFIXES]
        found.append(next((folder / name for name in names if (folder / name).is_file()), None))
    missing = [q for q, path in zip(questions, found, strict=True) if path is None]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(questions)} pictures are not in {str(folder)!r}, e.g. "
            f"{missing[0].address.rpartition('/')[2]} or {missing[0].image_id}.jpg.",
            advice="Download them from the addresses in image_src of the question file, or take "
            "the images of Shengcao1006/MMHal-Bench on Hugging Face, and name their folder.",
        )
    return [path for path in found if path is not None]


def task(questions: Sequence[Question], folder: Path, *, judge: str = "not-judged") -> Task:
    """The questions as requests.

    Args:
        questions: The questions.
        folder: Where the pictures are.
        judge: Name of the judge, for the name of the results.

    Raises:
        InputError: If pictures are missing.
    """
    pictures = find_pictures(questions, folder)
    items = tuple(
        Item(
            Request(str(question.index), (picture,), question.text),
            {
                "index": question.index,
                "image": picture.name,
                "question_type": question.type,
                "objects": question.objects,
                "question": question.text,
                "reference": question.reference,
            },
        )
        for question, picture in zip(questions, pictures, strict=True)
    )
    return Task(f"mmhal/{judge}", items)


def check_lines(lines: Sequence[Mapping[str, Any]]) -> None:
    """Refuses lines that are not stored answers to these questions.

    Raises:
        InputError: Names line and reason.
    """
    if not lines:
        raise InputError("There are no answers to score.", advice="Give at least one.")
    check_ids(lines)
    seen: set[int] = set()
    for number, line in enumerate(lines, start=1):
        check_texts(line, number, _TEXTS, _SOURCE)
        answer_text(line, number)
        index = line.get("index")
        if type(index) is not int or not 0 <= index < COUNT or index in seen:
            raise InputError(
                f"Line {number}: the index is {index!r}; expected is each of 0 to {COUNT - 1} "
                "once.",
                advice=f"Score files of `{_SOURCE}`.",
            )
        seen.add(index)
        if line["question_type"] != TYPES[index % len(TYPES)]:
            raise InputError(
                f"Line {number}: question {index} is said to be of type "
                f"{line['question_type']!r}, officially it is {TYPES[index % len(TYPES)]!r}.",
                advice="These answers belong to another question file.",
            )
