"""Mantis-Eval: 217 questions about two to five pictures, with options or a short answer.

Paper: Jiang et al., "MANTIS: Interleaved Multi-Image Instruction Tuning", arXiv 2405.01483. Prompt
and reading are lmms-eval's, which appends the options as a Python list (``['(A) yes', ...]``)
directly behind the instruction. lmms-eval samples at temperature 0.2; the default here is greedy,
so numbers differ from its numbers by chance, and do not change on re-run.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from benchmarks.base import Scores
from benchmarks.choices import LETTERS
from benchmarks.multi_image.questions import Question, make_task, mark_pictures
from benchmarks.multi_image.rows import Pictures, Row, read_rows
from benchmarks.multi_image.scoring import Reading, Scored, score_lines

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.run import Task

__all__ = ["SIZES", "SPLITS", "read_questions", "score_stored", "task"]

SIZES = {"test": 217}
SPLITS = ("test",)
VARIANT = "lmms-eval"
_ANNOUNCEMENTS = ("final answer:", "the answer is", "answer:")


def read_questions(path: Path, pictures: Pictures, split: str = "test") -> list[Question]:
    """Reads Mantis-Eval with the columns of the hub (id, question_type, question, images ...).

    Args:
        path: See `benchmarks.multi_image.rows.read_rows`.
        pictures: Where the pictures go.
        split: test; the data set has no other.

    Raises:
        InputError: If a row lacks a column or has no picture.
    """
    return [_question(row, pictures) for row in read_rows(path, split)]


def _question(row: Row, pictures: Pictures) -> Question:
    kind = row.text("question_type")
    shown = pictures.of(row, "images")
    if not shown:
        raise row.refused("there is no picture")
    text, marked = mark_pictures(row.text("question"), len(shown), row.place)
    label = row.text("answer")
    if kind == "multi-choice":
        options = row.texts("options")
        instruction = "Answer with the option's letter from the given choices directly."
        prompt = f"{text}\n{instruction}{list(options)}"
        if not re.search("[A-Za-z]", label):
            raise row.refused(f"the answer {label!r} has no letter")
    elif kind == "short-answer":
        options = ()
        prompt = (
            f"Given the images, answer the following short answer vqa question:\nQ: {text}\n"
            'You can first give your analysis, and then give your final answer as "Final Answer:"'
        )
    else:
        raise row.refused(f"the question_type is {kind!r}")
    return Question(
        id=row.text("id"),
        subject=kind,
        prompt=prompt,
        pictures=shown,
        label=label,
        options=options,
        marked=marked,
        text=row.text("question"),
    )


def task(questions: Sequence[Question], split: str = "test") -> Task:
    """The requests."""
    return make_task("mantis", split, VARIANT, questions)


def score_stored(lines: Sequence[Mapping[str, Any]]) -> Scores:
    """Scores stored answers: all together, and questions with and without options.

    Raises:
        InputError: If a line is damaged, doubled, or of another benchmark.
    """
    return score_lines(
        "mantis", VARIANT, lines, _read, macro=False, sizes=SIZES, official=_official
    )


def _read(line: Mapping[str, Any]) -> Reading:
    label, reply = line["label"].strip("()\n "), line["text"]
    answer = _final_answer(reply)
    if not line["options"]:
        return Reading(answer, label.lower() == answer.lower())
    letter = next(one for one in label if one.isalpha())
    named = re.match(r"Answer: ([A-Z])", answer)
    said = named[1] if named else next((one.upper() for one in answer if one.isalpha()), "")
    if said and said in LETTERS[: len(line["options"])]:
        return Reading(said, said == letter.upper())
    number = LETTERS.index(letter.upper())
    text = line["options"][number] if number < len(line["options"]) else None
    right = text is not None and reply.strip() == _without_letter(text, letter)
    return Reading(said, right, "read as text" if right else "no option")


def _final_answer(reply: str) -> str:
    low = reply.lower()
    for announcement in _ANNOUNCEMENTS:
        if announcement in low:
            return reply[low.index(announcement) + len(announcement) :].strip()
    return reply


def _without_letter(option: str, letter: str) -> str:
    for lead in (f"{letter}.", f"{letter}:", f"({letter})"):
        if option.startswith(lead):
            return option[len(lead) :].strip()
    return option.strip()


def _official(scored: Sequence[Scored]) -> dict[str, Any]:
    right = [reading.correct for _, reading in scored]
    return {"mantis_score": sum(right) / len(right) if right else None}
