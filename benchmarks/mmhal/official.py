"""MMHal-Bench in the files of the official scripts: answers, and the replies of their judge."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_json, read_records
from benchmarks.judges import judged
from benchmarks.mmhal.questions import COUNT, Question, check_lines, read_questions
from benchmarks.stored import answer_text
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    Line = Mapping[str, Any]

__all__ = ["read_answers", "write_official"]


def write_official(path: Path, lines: Sequence[Line], questions: Sequence[Question]) -> None:
    """Writes answers as the official scripts read them: the question file with ``model_answer``.

    Raises:
        InputError: If an answer is missing.
    """
    check_lines(lines)
    texts = {line["index"]: answer_text(line, i) for i, line in enumerate(lines, start=1)}
    if missing := [question.index for question in questions if texts.get(question.index) is None]:
        raise InputError(
            f"{len(missing)} of {len(questions)} answers are missing, e.g. that of question "
            f"{missing[0]}.",
            advice="Repeat the failed questions; the official script cannot skip any.",
        )
    records = [
        {
            "question_type": question.type,
            "question_topic": question.topic,
            "image_id": question.image_id,
            "image_src": question.address,
            "image_content": question.objects.split(", "),
            "question": question.text,
            "gt_answer": question.reference,
            "model_answer": texts[question.index],
        }
        for question in questions
    ]
    path.write_text(json.dumps(records, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def read_answers(
    path: Path, reviews: Path | None = None, judge: str = "official-file"
) -> list[dict[str, Any]]:
    """Reads stored answers, or an official answer file, perhaps with the official judge's replies.

    Args:
        path: Answers of `mmlm bench mmhal`, or the question file with ``model_answer``.
        reviews: The chat completions that eval_gpt_mmhal.py writes, in the order of the questions.
        judge: Name of the judge in ``reviews``.

    Raises:
        InputError: If a file cannot be read, or the reviews are not as many as the answers.
    """
    records = read_records(path)
    if "model_answer" not in records[0]:
        if reviews is not None:
            raise InputError(
                f"{path} is no official answer file, so {reviews} does not belong to it.",
                advice="Give --reviews only with a file that has model_answer.",
            )
        return judged.read_answers(path)
    questions = read_questions(path)
    lines = [
        {
            "id": str(question.index),
            "index": question.index,
            "image": question.address.rpartition("/")[2],
            "question_type": question.type,
            "question_topic": question.topic,
            "objects": question.objects,
            "question": question.text,
            "reference": question.reference,
            "text": record.get("model_answer"),
        }
        for question, record in zip(questions, records, strict=True)
    ]
    if reviews is None:
        return lines
    replies = _read_reviews(reviews)
    return [
        {**line, "judge": judge, "judged": {"rating": {"reply": reply}}}
        for line, reply in zip(lines, replies, strict=True)
    ]


def _read_reviews(path: Path) -> list[str]:
    reviews = read_json(path)
    if not isinstance(reviews, list) or len(reviews) != COUNT:
        raise InputError(
            f"{path} does not hold a list of {COUNT} replies.",
            advice="Give the file that eval_gpt_mmhal.py wrote.",
        )
    replies = []
    for number, review in enumerate(reviews, start=1):
        try:
            reply = review["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError) as error:
            raise InputError(
                f"{path}, entry {number} is no chat completion.",
                advice="Give the file that eval_gpt_mmhal.py wrote.",
            ) from error
        if not isinstance(reply, str):
            raise InputError(
                f"{path}, entry {number}: the reply is {reply!r}.", advice="Judge it again."
            )
        replies.append(reply)
    return replies
