"""Files of Object HalBench: its questions, the requests made of them, and answers to exchange."""

from __future__ import annotations

import base64
import binascii
import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_records
from benchmarks.run import Item, Task
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "SOURCE",
    "Question",
    "check_embedded",
    "find_pictures",
    "official_lines",
    "read_official",
    "read_questions",
    "task",
    "unpack_pictures",
    "write_official",
]

SOURCE = (
    "mmlm data fetch object-halbench; or take obj_halbench_300_with_image.jsonl from eval/data of "
    "github.com/RLHF-V/RLAIF-V and give --data FILE."
)
NAMES = ("COCO_val2014_{:012d}.jpg", "COCO_train2014_{:012d}.jpg", "{:012d}.jpg")


@dataclass(frozen=True)
class Question:
    """One question of the benchmark.

    Attributes:
        id: Its place in the file, from "0".
        image_id: COCO's id of the picture.
        text: What is asked.
        picture: The picture file, if the question file holds it.
    """

    id: str
    image_id: int
    text: str
    picture: bytes | None = field(default=None, repr=False)


def read_questions(path: str | Path) -> list[Question]:
    """Reads the official question file: JSON lines with image_id, question and image (base64).

    Raises:
        InputError: If it cannot be read, a field is missing or of a wrong type, a picture cannot
            be decoded, or a question occurs twice.
    """
    questions: list[Question] = []
    seen: set[tuple[int, str]] = set()
    for number, record in enumerate(read_records(path), start=1):
        place = f"{path}, record {number}"
        text = record.get("question")
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"{place} has no text in 'question'.", advice=SOURCE)
        image = _image_id(record, place)
        if (image, text) in seen:
            raise InputError(
                f"{place}: this question about picture {image} is there twice.", advice=SOURCE
            )
        seen.add((image, text))
        picture = _decoded(record.get("image"), place)
        questions.append(Question(str(number - 1), image, text, picture))
    return questions


def find_pictures(questions: Sequence[Question], folder: Path) -> dict[int, Path]:
    """The picture files in a folder under COCO's names.

    Raises:
        InputError: If some are missing; says how many.
    """
    found = {}
    for image in dict.fromkeys(question.image_id for question in questions):
        paths = (folder / name.format(image) for name in NAMES)
        if (path := next((path for path in paths if path.is_file()), None)) is not None:
            found[image] = path
    wanted = {question.image_id for question in questions}
    if missing := sorted(wanted - found.keys()):
        raise InputError(
            f"{len(missing)} of {len(wanted)} pictures are missing in {str(folder)!r}, e.g. "
            f"{NAMES[0].format(missing[0])}.",
            advice="Give the folder of COCO's val2014 pictures: mmlm data fetch coco-val2014.",
        )
    return found


def check_embedded(questions: Sequence[Question]) -> None:
    """Refuses questions without their picture.

    Raises:
        InputError: Says how many there are.
    """
    if bare := [question for question in questions if question.picture is None]:
        raise InputError(
            f"{len(bare)} of {len(questions)} questions come without their picture.",
            advice="Give --images FOLDER with COCO's val2014 pictures.",
        )


def unpack_pictures(questions: Sequence[Question], folder: Path) -> dict[int, Path]:
    """Writes the pictures that the question file holds into a folder; returns where they are.

    Raises:
        InputError: If the file does not hold them all.
    """
    check_embedded(questions)
    folder.mkdir(parents=True, exist_ok=True)
    paths = {}
    for question in questions:
        path = folder / NAMES[2].format(question.image_id)
        if question.picture is not None and not path.is_file():
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(question.picture)
            temporary.replace(path)
        paths[question.image_id] = path
    return paths


def task(questions: Sequence[Question], pictures: Mapping[int, Path]) -> Task:
    """The requests: each question about its picture, as it stands in the file.

    Args:
        questions: What is asked.
        pictures: Where the pictures are, by image id.
    """
    items = tuple(
        Item(
            Request(question.id, (pictures[question.image_id],), question.text),
            {
                "image_id": question.image_id,
                "image": pictures[question.image_id].name,
                "question": question.text,
            },
        )
        for question in questions
    )
    if not items:
        raise InputError("There are no questions to ask.", advice=SOURCE)
    return Task("object-halbench", items)


def official_lines(lines: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Stored answers as the authors' scripts read them: question_id, image_id, question, answer.

    Raises:
        InputError: If an answer is missing; the scripts have no way to say so.
    """
    official = []
    for number, line in enumerate(lines, start=1):
        if line.get("error") or not isinstance(line.get("text"), str):
            raise InputError(
                f"Line {number} ({line.get('id')!r}) has no answer.",
                advice="Repeat the failed questions first.",
            )
        official.append(
            {
                "question_id": line["id"],
                "image_id": line["image_id"],
                "question": line["question"],
                "answer": line["text"],
            }
        )
    return official


def write_official(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes stored answers for the authors' scripts, as JSON lines."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in official_lines(lines))
    path.write_text(text, encoding="utf-8")


def read_official(
    path: str | Path, questions: Sequence[Question] | None = None
) -> list[dict[str, Any]]:
    """Reads the authors' answer files: image_id, prompt or question, text or answer.

    Args:
        path: JSON lines or a list.
        questions: The question file, for answers without image_id: those are matched by their
            order, as the authors' scripts do, and by the question where it is given.

    Returns:
        Lines as `mmlm bench object-halbench` stores them.

    Raises:
        InputError: If a field is missing, or the answers belong to another question file.
    """
    records = read_records(path)
    if questions is not None and len(questions) != len(records):
        raise InputError(
            f"{path} has {len(records)} answers for {len(questions)} questions.",
            advice="Finish the run, or give the question file it was made with.",
        )
    lines = []
    for number, record in enumerate(records, start=1):
        place = f"{path}, record {number}"
        asked = _text(record, ("prompt", "question"), place)
        answer = _text(record, ("text", "answer"), place)
        if "image_id" not in record and questions is None:
            raise InputError(
                f"{place} has no image_id.", advice="Give the question file with --data."
            )
        image = _image_id(record, place) if "image_id" in record else None
        if questions is not None:
            image = _matched(questions[number - 1], image, asked, place)
        lines.append({"id": str(number - 1), "image_id": image, "question": asked, "text": answer})
    return lines


def _text(record: Mapping[str, Any], names: tuple[str, str], place: str) -> str:
    value = record.get(names[0], record.get(names[1]))
    if not isinstance(value, str):
        raise InputError(
            f"{place} has no text in {names[0]!r} or {names[1]!r}.",
            advice="Expected are image_id, question (or prompt), answer (or text).",
        )
    return value


def _matched(question: Question, image: int | None, asked: str, place: str) -> int:
    # Models' templates put things around the question, so it only has to be in the prompt.
    if image not in (None, question.image_id) or question.text.strip() not in asked:
        raise InputError(
            f"{place} does not answer question {question.id} of the question file.",
            advice="Give the question file the answers were made with, and keep its order.",
        )
    return question.image_id


def _image_id(record: Mapping[str, Any], place: str) -> int:
    value = record.get("image_id")
    if isinstance(value, str) and re.fullmatch(r"\d+", value):
        return int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InputError(
            f"{place}: image_id must be a number, found {value!r}.",
            advice="It is COCO's id of the picture.",
        )
    return value


def _decoded(value: Any, place: str) -> bytes | None:
    if value is None:
        return None
    try:
        return base64.b64decode(value, validate=True)
    except (binascii.Error, TypeError, ValueError) as error:
        raise InputError(
            f"{place}: the picture in 'image' is not base64 ({error}).", advice=SOURCE
        ) from error
