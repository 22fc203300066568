"""Answers to AMBER's questions: the stored lines, the authors' format, and how they are read.

The authors' script takes a JSON list of ``{"id", "response"}``. Such files can be scored here, and
stored lines can be written as such, so that anyone can score them again with that script.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.amber.data import EVALUATIONS, GENERATIVE, TYPES, Question, questions_of
from benchmarks.pope import PARSERS
from mmlm.errors import InputError
from mmlm.records import write_json

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "answer_text",
    "match_answers",
    "normalise",
    "official_lines",
    "question_of",
    "write_official",
]


def normalise(answer: str) -> str:
    """``Yes`` or ``No`` if that is the first word, whatever its case; else the answer as it is.

    The authors' script accepts nothing but the bare words: to it "Yes." and "no" are no answers.
    """
    said = PARSERS["strict"].read(answer, "")
    return answer if said is None else "Yes" if said else "No"


def match_answers(
    records: Sequence[Mapping[str, Any]],
    questions: Sequence[Question],
    *,
    partial: bool = False,
) -> list[dict[str, Any]]:
    """Turns answers in the authors' format, ``{"id", "response"}``, into lines to be scored.

    Args:
        records: The answers, in any order.
        questions: The questions they answer.
        partial: Whether some may be unanswered; otherwise all of one evaluation must be there.

    Returns:
        Lines as `mmlm bench amber` stores them, in the order of the records.

    Raises:
        InputError: If an id is missing, unknown or double, a response is no text, a record is about
            another question, or the answers are those of no evaluation.
    """
    known = {question.id: question for question in questions}
    lines: dict[int, dict[str, Any]] = {}
    for number, record in enumerate(records, start=1):
        question = _asked(record, known, number)
        if question.id in lines:
            raise InputError(
                f"Record {number}: question {question.id} is answered twice.",
                advice="Keep one answer for each question.",
            )
        text = answer_text(record, "response", f"Record {number}")
        lines[question.id] = {"id": str(question.id), **question.facts(), "text": text}
    if not lines:
        raise InputError("There are no answers.", advice="Give at least one.")
    sizes = {name: {q.id for q in questions_of(questions, name)} for name in EVALUATIONS}
    if not partial and lines.keys() not in sizes.values():
        smallest = min((ids for ids in sizes.values() if lines.keys() <= ids), key=len)
        missing = sorted(smallest - lines.keys())
        raise InputError(
            f"{len(lines)} of {len(smallest)} questions are answered; {len(missing)} answers are "
            f"missing, e.g. that to question {missing[0]}.",
            advice="Finish the run, or say that the answers are a part only (--partial).",
        )
    return list(lines.values())


def official_lines(
    lines: Sequence[Mapping[str, Any]], *, normalised: bool = True
) -> list[dict[str, Any]]:
    """Stored lines in the authors' format, for their ``inference.py``.

    Args:
        lines: Lines of `mmlm bench amber`.
        normalised: Whether yes/no answers are reduced to ``Yes`` and ``No``, which the authors ask
            for. What the model said stays beside it as ``raw``; their script does not look at it.

    Raises:
        InputError: If a line holds an error or no text: the authors' script would count the rest
            as if it were all.
    """
    result = []
    for number, line in enumerate(lines, start=1):
        place = f"Line {number}"
        if line.get("error"):
            raise InputError(
                f"{place} holds an error instead of an answer: {line['error']}.",
                advice="Repeat the failed requests first.",
            )
        question = question_of(line, place)
        text = answer_text(line, "text", place)
        record: dict[str, Any] = {"id": question.id, "response": text}
        if normalised and question.type != GENERATIVE:
            record |= {"response": normalise(text), "raw": text}
        result.append(record)
    return result


def write_official(
    path: str | Path, lines: Sequence[Mapping[str, Any]], *, normalised: bool = True
) -> None:
    """Writes `official_lines` as the JSON list that the authors' script reads."""
    write_json(Path(path), official_lines(lines, normalised=normalised))


def answer_text(record: Mapping[str, Any], name: str, place: str) -> str:
    """The text of an answer.

    Raises:
        InputError: If it is missing or no text, e.g. NaN.
    """
    text = record.get(name)
    if not isinstance(text, str):
        raise InputError(
            f"{place}: the answer in {name!r} is {text!r}, not a text.",
            advice="Every answer must be a text; an empty one is allowed.",
        )
    return text


def question_of(line: Mapping[str, Any], place: str) -> Question:
    """The question that a stored line answers, from the facts in the line alone.

    Raises:
        InputError: If a fact is missing; names it.
    """
    generative = line.get("type") == GENERATIVE
    kinds = {"question_id": int, "image": str, "question": str, "type": str}
    kinds |= {"truth": list, "hallu": list} if generative else {"label": str}
    for name, kind in kinds.items():
        if not isinstance(line.get(name), kind):
            raise InputError(
                f"{place} has no {name!r}.",
                advice="Score files of `mmlm bench amber`, or a JSON list of {'id', 'response'}.",
            )
    head = (line["question_id"], line["image"], line["question"], line["type"])
    if generative:
        return Question(*head, truth=tuple(line["truth"]), hallu=tuple(line["hallu"]))
    if line["type"] not in TYPES or line["label"] not in ("yes", "no"):
        raise InputError(
            f"{place}: type {line['type']!r} with label {line['label']!r} is none of AMBER's.",
            advice=f"Types are {', '.join(TYPES)}; labels are yes and no.",
        )
    return Question(*head, label=line["label"])


def _asked(record: Mapping[str, Any], known: Mapping[int, Question], number: int) -> Question:
    identifier = record.get("id")
    if type(identifier) is not int or identifier not in known:
        raise InputError(
            f"Record {number}: the id {identifier!r} is none of AMBER's (1 to {max(known)}).",
            advice="Give answers to AMBER's questions, as [{'id': 1, 'response': '...'}, ...].",
        )
    question = known[identifier]
    for name, value in (("query", question.text), ("image", question.image)):
        if record.get(name, value) != value:
            raise InputError(
                f"Record {number} is about {record[name]!r}, question {identifier} is about "
                f"{value!r}.",
                advice="Give the question files the answers were made with (--data).",
            )
    return question
