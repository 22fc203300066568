"""BLINK: fourteen visual tasks that people solve at a glance.

Paper: Fu et al., "BLINK: Multimodal Large Language Models Can See but Not Perceive", arXiv
2404.12390. Only the answers of ``val`` are public (1,901 questions; the 3,807 of some papers are
val and test together). The prompt is lmms-eval's. How the reply is read is part of the name:

* ``first-letter``: the reply's first letter, even if it only begins a word, so that "I think B" is
  wrong; lmms-eval's rule for most of its history, and that of published numbers.
* ``stated-letter``: lmms-eval 0.7.3; a letter that is stated as the answer counts wherever it is.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, Literal, get_args

from benchmarks.base import Scores
from benchmarks.choices import LETTERS, first_letter, stated_letter
from benchmarks.multi_image.questions import Question, make_task, mark_pictures, read_answers_by_id
from benchmarks.multi_image.rows import Pictures, Row, read_rows
from benchmarks.multi_image.scoring import Reading, Scored, answered_lines, score_lines
from mmlm.records import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.run import Task

__all__ = [
    "SIZES",
    "SPLITS",
    "Parser",
    "read_official",
    "read_questions",
    "score_stored",
    "task",
    "write_official",
]

Parser = Literal["first-letter", "stated-letter"]
SIZES = {"val": 1901, "test": 1906}
SPLITS = ("val", "test")


def read_questions(path: Path, pictures: Pictures, split: str = "val") -> list[Question]:
    """Reads BLINK with the columns of the hub: idx, sub_task, prompt, choices, answer, image_1 ...

    Args:
        path: See `benchmarks.multi_image.rows.read_rows`.
        pictures: Where the pictures go.
        split: val, or test, whose answers are secret.

    Raises:
        InputError: If a row lacks a column or has no picture.
    """
    return [_question(row, pictures) for row in read_rows(path, split)]


def _question(row: Row, pictures: Pictures) -> Question:
    columns = [name for name in row.values if re.fullmatch(r"image_\d+", name)]
    shown = pictures.of(row, *sorted(columns, key=lambda name: int(name[6:])))
    if not shown:
        raise row.refused("there is no picture")
    options = row.texts("choices")
    prompt, marked = mark_pictures(row.text("prompt"), len(shown), row.place)
    letters = ", ".join(LETTERS[: len(options)])
    note = f"Note: You only need to respond with {letters} without providing any additional "
    label = row.text("answer").strip("()")
    if label != "hidden" and label not in LETTERS[: len(options)]:
        raise row.refused(f"the answer {label!r} is none of {letters}")
    return Question(
        id=row.text("idx"),
        subject=row.text("sub_task"),
        prompt=f"{note}information.\n{prompt}",
        pictures=shown,
        label=None if label == "hidden" else label,
        options=options,
        marked=marked,
        text=row.text("prompt"),
    )


def task(
    questions: Sequence[Question], split: str = "val", parser: Parser = "first-letter"
) -> Task:
    """The requests."""
    return make_task("blink", split, parser, questions)


def score_stored(lines: Sequence[Mapping[str, Any]], parser: Parser = "first-letter") -> Scores:
    """Scores stored answers; the headline is the mean over the fourteen tasks.

    Args:
        lines: Lines of `mmlm bench blink`.
        parser: How the reply is read.

    Raises:
        ValueError: If the parser is unknown.
        InputError: If a line is damaged, doubled, or of another benchmark.
    """
    if parser not in get_args(Parser):
        raise ValueError(f"parser must be one of {get_args(Parser)}, got {parser!r}")
    return score_lines(
        "blink",
        parser,
        lines,
        lambda line: _read(line, parser),
        macro=True,
        sizes=SIZES,
        official=_official,
    )


def _read(line: Mapping[str, Any], parser: Parser) -> Reading:
    count = len(line["options"])
    by_rule = parser == "stated-letter"
    letter = (stated_letter(line["text"], count) if by_rule else first_letter(line["text"])).letter
    known = letter in LETTERS[:count] and letter != ""
    return Reading(letter, letter == line["label"], "" if known else "no option")


def _official(scored: Sequence[Scored]) -> dict[str, Any]:
    """lmms-eval's figure: the share of right answers of all tasks together."""
    right = [reading.correct for _, reading in scored]
    return {"blink_acc": sum(right) / len(right) if right else None}


def write_official(
    path: Path, lines: Sequence[Mapping[str, Any]], parser: Parser = "first-letter"
) -> None:
    """Writes the answers as BLINK's evaluation server reads them: ``{"val_Counting_1": "(A)"}``.

    A reply in which no option is found is written as it is.
    """
    answered, _ = answered_lines("blink", lines)
    readings = [(line, _read({**line, "label": ""}, parser)) for line in answered]
    write_json(
        path,
        {line["id"]: line["text"] if r.status else f"({r.said})" for line, r in readings},
    )


def read_official(
    path: Path, questions: Sequence[Question], split: str = "val"
) -> list[dict[str, Any]]:
    """Reads such a file as lines to score.

    Raises:
        InputError: If it is no such file, or not about exactly these questions.
    """
    example = '{"val_Counting_1": "(A)", ...}'
    return read_answers_by_id(path, "blink", split, questions, example)
