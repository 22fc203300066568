"""MMMU: college questions of 30 subjects, with pictures inside the text.

Paper: Yue et al., "MMMU: A Massive Multi-discipline Multimodal Understanding and Reasoning
Benchmark", arXiv 2311.16502. Prompt and scoring are those of lmms-eval 0.7.3 (``mmmu_val``). It
answers by a random option where it finds none; here that draw depends on question and seed, and is
counted. Every picture stands where the text first mentions it; lmms-eval sorts the pictures, which
exchanges them where a text mentions the second one first.
"""

from __future__ import annotations

import ast
import re
from typing import TYPE_CHECKING, Any

from benchmarks.base import Scores
from benchmarks.choices import LETTERS, is_open_answer_right, last_named_option
from benchmarks.multi_image.questions import Question, make_task, read_answers_by_id
from benchmarks.multi_image.rows import Pictures, Row, read_rows
from benchmarks.multi_image.scoring import Reading, Scored, answered_lines, score_lines
from mmlm.records import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.run import Task

__all__ = [
    "DOMAINS",
    "SIZES",
    "SPLITS",
    "read_official",
    "read_questions",
    "score_stored",
    "task",
    "write_official",
]

SIZES = {"dev": 150, "validation": 900, "test": 10_500}
SPLITS = ("validation", "dev", "test")
VARIANT = "last-named"
CHOICE_SUFFIX = "Answer with the option's letter from the given choices directly."
OPEN_SUFFIX = "Answer the question using a single word or phrase."
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine "
    "Diagnostics_and_Laboratory_Medicine Pharmacy Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science "
    "Electronics Energy_and_Power Materials Mechanical_Engineering",
}
_MARK = re.compile(r"\s*<image (\d+)>\s*")


def read_questions(path: Path, pictures: Pictures, split: str = "validation") -> list[Question]:
    """Reads MMMU with the columns of the data set on the hub (id, question, options, image_1 ...).

    Args:
        path: See `benchmarks.multi_image.rows.read_rows`.
        pictures: Where the pictures go.
        split: validation (900 questions), dev, or test (answers are secret).

    Raises:
        InputError: If a row lacks a column, or a picture that its text mentions.
    """
    return [_question(row, pictures) for row in read_rows(path, split)]


def _question(row: Row, pictures: Pictures) -> Question:
    identifier = row.text("id")
    subject = re.fullmatch(r"[^_]+_(.+?)_\d+", identifier)
    if subject is None:
        raise row.refused(f"the id {identifier!r} is not like validation_Art_1")
    choice = row.text("question_type") == "multiple-choice"
    options = _options(row) if choice else ()
    listed = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, options, strict=False))
    text = row.text("question")
    prompt = f"{text}\n{listed}\n\n{CHOICE_SUFFIX}" if choice else f"{text}\n\n{OPEN_SUFFIX}"
    numbers = list(dict.fromkeys(_MARK.findall(prompt)))
    shown = [pictures.of(row, f"image_{number}") for number in numbers]
    if empty := [number for number, found in zip(numbers, shown, strict=True) if len(found) != 1]:
        raise row.refused(f"the text mentions image {empty[0]}, which the row does not have")
    place = {number: position for position, number in enumerate(numbers, start=1)}
    return Question(
        id=identifier,
        subject=subject[1],
        prompt=_with_marks(prompt, place),
        pictures=tuple(found[0] for found in shown),
        label=_label(row),
        options=options,
        marked=bool(numbers),
        text=text,
        facts={"kind": "choice" if choice else "open"},
    )


def _with_marks(prompt: str, place: Mapping[str, int]) -> str:
    """The pictures numbered as they are shown, with no blanks around them, as lmms-eval has it."""
    first: set[str] = set()

    def renumber(match: re.Match[str]) -> str:
        mark = f"<image {place[match[1]]}>"
        if match[1] in first:  # it only names a picture that was shown
            return match[0].replace(f"<image {match[1]}>", mark)
        first.add(match[1])
        return mark

    return _MARK.sub(renumber, prompt).strip()


def _options(row: Row) -> tuple[str, ...]:
    """The options; the data set holds them as the text of a Python list."""
    value = row.values.get("options")
    if isinstance(value, str):
        try:
            value = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            raise row.refused(f"the options {value!r} are no list") from None
    if not isinstance(value, list) or not 1 < len(value) <= len(LETTERS):
        raise row.refused(f"the options {value!r} are no list of two or more")
    return tuple(str(one) for one in value)


def _label(row: Row) -> str | tuple[str, ...] | None:
    value = row.values.get("answer")
    if value is None or value == "?":
        return None
    return tuple(row.texts("answer")) if isinstance(value, list) else row.text("answer")


def task(questions: Sequence[Question], split: str = "validation") -> Task:
    """The requests."""
    return make_task("mmmu", split, VARIANT, questions)


def score_stored(lines: Sequence[Mapping[str, Any]], *, seed: int = 0) -> Scores:
    """Scores stored answers; the headline is the mean over the subjects.

    Args:
        lines: Lines of `mmlm bench mmmu`.
        seed: Seed of the options drawn where none was found.

    Raises:
        InputError: If a line is damaged, doubled, or of another benchmark.
    """
    return score_lines(
        "mmmu",
        VARIANT,
        lines,
        lambda line: _read(line, seed),
        macro=True,
        sizes=SIZES,
        official=_official,
    )


def _read(line: Mapping[str, Any], seed: int) -> Reading:
    label = line["label"]
    answers = label if isinstance(label, list) else [label]
    if not line["options"]:
        return Reading("", is_open_answer_right(line["text"], answers))
    choice = last_named_option(line["text"], line["options"], line["id"], seed)
    status = "random option" if choice.how == "random" else ""
    return Reading(choice.letter, choice.letter in answers, status)


def _official(scored: Sequence[Scored]) -> dict[str, Any]:
    """lmms-eval's figures: accuracies over all questions, rounded to five decimals."""
    groups: dict[str, list[bool]] = {"Overall": [reading.correct for _, reading in scored]}
    for domain, subjects in DOMAINS.items():
        own = [r.correct for line, r in scored if line["subject"] in subjects.split()]
        if own:
            groups[f"Overall-{domain}"] = own
    return {name: round(sum(r) / len(r), 5) if r else None for name, r in groups.items()}


def write_official(path: Path, lines: Sequence[Mapping[str, Any]], *, seed: int = 0) -> None:
    """Writes the answers as MMMU's own evaluation reads them: one answer by question id.

    Of a multiple-choice question it is the letter, of an open one the reply.
    """
    answered, _ = answered_lines("mmmu", lines)
    record = {}
    for line in answered:
        reply, options = line["text"], line["options"]
        letter = last_named_option(reply, options, line["id"], seed).letter if options else reply
        record[line["id"]] = letter
    write_json(path, record)


def read_official(
    path: Path, questions: Sequence[Question], split: str = "validation"
) -> list[dict[str, Any]]:
    """Reads a file of MMMU's own evaluation, ``{question id: answer}``, as lines to score.

    Raises:
        InputError: If it is no such file, or not about exactly these questions.
    """
    example = '{"validation_Art_1": "A", ...}'
    return read_answers_by_id(path, "mmmu", split, questions, example)
