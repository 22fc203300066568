"""POPE's answers: asking for them, what a run stores, and the authors' files.

POPE-Chat asks all questions about one picture in one conversation. A conversation is stored as one
line, so that a stopped run never holds half of it; `spread` turns it into one line per question,
and from there on both forms of POPE are the same.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_records
from benchmarks.pope.questions import (
    KINDS,
    VERSIONS,
    Question,
    published,
    recognise,
    write_questions,
)
from benchmarks.run import Item, Task
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Iterator

__all__ = ["match_answers", "missing_answers", "official_lines", "spread", "task", "write_official"]

Line = Mapping[str, Any]


def task(
    splits: Mapping[str, Sequence[Question]],
    folder: Path,
    *,
    suffix: str = "",
    version: str = "custom",
    parser: str = "strict",
    chat: bool = False,
) -> Task:
    """The yes/no questions of one or more splits.

    Args:
        splits: Questions by split.
        folder: Where the pictures are.
        suffix: Put after every question.
        version: Version of the questions, used for files that are none of the published.
        parser: How answers will be read.
        chat: Ask all questions about a picture in one conversation, in their order, each after
            the model's own answers to those before it (POPE-Chat, introduced with PAI, Liu et
            al., arXiv 2407.21771).

    Raises:
        InputError: If there is no question.
    """
    items: list[Item] = []
    versions = set()
    for split, questions in splits.items():
        known = recognise(questions)
        named = known[0] if known else version
        versions.add(named)
        facts = {"split": split, "version": named}
        if chat:
            items += _conversations(questions, folder, suffix, facts)
        else:
            items += [_single(question, folder, suffix, facts) for question in questions]
    if not items:
        raise InputError("There are no questions to ask.", advice="Give at least one.")
    name = "+".join(sorted(versions)) + ("/chat" if chat else "")
    return Task(f"pope/{name}/{parser}", tuple(items))


def _single(question: Question, folder: Path, suffix: str, facts: Line) -> Item:
    request = Request(
        f"{facts['split']}-{question.question_id}",
        (folder / question.image,),
        question.text + suffix,
    )
    return Item(request, {**facts, **_facts(question), "image": question.image})


def _conversations(
    questions: Sequence[Question], folder: Path, suffix: str, facts: Line
) -> Iterator[Item]:
    by_image: dict[str, list[Question]] = {}
    for question in questions:
        by_image.setdefault(question.image, []).append(question)
    for image, asked in by_image.items():
        first, *further = (question.text + suffix for question in asked)
        request = Request(f"{facts['split']}-{image}", (folder / image,), first, tuple(further))
        yield Item(
            request,
            {**facts, "image": image, "questions": [_facts(question) for question in asked]},
        )


def _facts(question: Question) -> dict[str, Any]:
    return {
        "question_id": question.question_id,
        "question": question.text,
        "label": question.label,
    }


def spread(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """One line per question: conversations are taken apart, other lines stay as they are.

    Returns:
        Lines with ``split``, ``version``, ``question_id``, ``image``, ``question``, ``label`` and
        ``text``, or an ``error`` instead; those of a conversation say ``chat: true``.

    Raises:
        InputError: If a line lacks a field, an id occurs twice, or a conversation has not one
            answer per question.
    """
    flat: list[dict[str, Any]] = []
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        place = f"Line {number}"
        if "id" in line:
            if str(line["id"]) in seen:
                raise InputError(
                    f"{place}: the id {line['id']!r} occurs twice.",
                    advice="Keep one line per id.",
                )
            seen.add(str(line["id"]))
        flat += _turns(line, place) if "questions" in line else [_checked(dict(line), place)]
    return flat


def _turns(line: Line, place: str) -> list[dict[str, Any]]:
    asked, turns = line["questions"], line.get("turns", ())
    failed = bool(line.get("error"))
    if not failed and len(turns) != len(asked):
        raise InputError(
            f"{place} has {len(turns)} answers to {len(asked)} questions.",
            advice="The file was changed since it was written; repeat the run.",
        )
    common = {name: line.get(name) for name in ("split", "version", "image")} | {"chat": True}
    flat = []
    for position, facts in enumerate(asked):
        one = {"id": f"{line.get('split')}-{facts.get('question_id')}", **common, **facts}
        one |= {"error": line["error"]} if failed else turns[position]
        flat.append(_checked(one, place))
    return flat


def _checked(line: dict[str, Any], place: str) -> dict[str, Any]:
    needed = ["split", "version", "image", "label"]
    if not line.get("error"):
        needed.append("text")
    if missing := [name for name in needed if not isinstance(line.get(name), str)]:
        raise InputError(
            f"{place} has no {missing[0]!r} (it is {line.get(missing[0])!r}).",
            advice="Score files of `mmlm bench pope`, or give the question file as well.",
        )
    return line


def missing_answers(flat: Sequence[Line]) -> int:
    """How many questions of the published files have no line, e.g. after an interrupted run.

    Splits whose version does not ship with mmlm are taken as they are.

    Args:
        flat: Lines of `spread`.

    Raises:
        InputError: If a line's question, picture or label is not that of the file which its
            version names, or a question is answered twice.
    """
    missing = 0
    for split, version in {(line["split"], line["version"]): None for line in flat}:
        if version not in VERSIONS or split not in KINDS:
            continue
        questions = {question.question_id: question for question in published(version)[split]}
        ids: Counter[Any] = Counter()
        for line in flat:
            if (line["split"], line["version"]) == (split, version):
                _check_question(line, questions)
                ids[line["question_id"]] += 1
        if twice := [identifier for identifier, count in ids.items() if count > 1]:
            raise InputError(
                f"Question {twice[0]} of {version}/{split} is answered {ids[twice[0]]} times.",
                advice="Keep one answer per question.",
            )
        missing += len(questions) - len(ids)
    return missing


def _check_question(line: Line, questions: Mapping[Any, Question]) -> None:
    question = questions.get(line.get("question_id"))
    given = (line["image"], line.get("question"), line["label"])
    if question is None or given != (question.image, question.text, question.label):
        raise InputError(
            f"{line['version']}/{line['split']} has no question {line.get('question_id')!r} "
            f"{line.get('question')!r} about {line['image']!r} with the label {line['label']!r}.",
            advice="The answers belong to another question file; score them with --questions.",
        )


def official_lines(lines: Sequence[Line]) -> dict[str, list[dict[str, Any]]]:
    """Stored answers as the authors' `evaluate.py` reads them, by split, in question order.

    Returns:
        For each split records with ``question`` and ``answer``, and the ``question_id``, ``image``
        and ``label`` that make up the question file.

    Raises:
        InputError: If a question has no answer: the official script pairs answers and labels by
            position, so a gap would shift all the others.
    """
    splits: dict[str, list[dict[str, Any]]] = {}
    for line in spread(lines):
        if line.get("error"):
            raise InputError(
                f"The question {line.get('id')!r} has no answer: {line['error']}",
                advice="The official script needs every answer; repeat the failed questions.",
            )
        record = {name: line.get(name) for name in ("question_id", "question")}
        record |= {"answer": line["text"], "image": line["image"], "label": line["label"]}
        splits.setdefault(line["split"], []).append(record)
    for split, records in splits.items():
        if not all(isinstance(record["question_id"], int) for record in records):
            raise InputError(
                f"Some answers of {split!r} have no question_id.",
                advice="Export files of `mmlm bench pope`.",
            )
        records.sort(key=lambda record: record["question_id"])
    return splits


def write_official(folder: Path, lines: Sequence[Line]) -> list[Path]:
    """Writes, for each split, the answers and the question file that the authors' script takes.

    ``answers_<split>.jsonl`` holds ``question`` and ``answer`` (POPE's format), and
    ``question_id``, by which LLaVA's script goes; ``questions_<split>.jsonl`` is byte for byte
    the question file, in the format of the published ones.

    Raises:
        InputError: As `official_lines`; nothing is written then.
    """
    splits = official_lines(lines)
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for split, records in splits.items():
        answers = [
            {name: record[name] for name in ("question_id", "question", "answer")}
            for record in records
        ]
        path = folder / f"answers_{split}.jsonl"
        text = "".join(json.dumps(answer, ensure_ascii=False) + "\n" for answer in answers)
        path.write_text(text, encoding="utf-8", newline="\n")
        questions = [
            Question(r["question_id"], r["image"], r["question"], r["label"]) for r in records
        ]
        write_questions(folder / f"questions_{split}.jsonl", questions)
        written += [path, folder / f"questions_{split}.jsonl"]
    return written


def match_answers(path: str | Path, questions: Sequence[Question]) -> list[str]:
    """Reads answers to the given questions: JSON lines or a list, plain or gzipped.

    The text stands in ``text`` or ``answer``. Records that have a ``question_id`` are matched by
    it, the others by position; a question text that is present must agree.

    Raises:
        InputError: If the file cannot be read, an answer is missing, superfluous or double, or
            belongs to another question.
    """
    records = read_records(path)
    if len(records) != len(questions):
        raise InputError(
            f"{path} has {len(records)} answers for {len(questions)} questions.",
            advice="Finish the run, or give the question file it was made with.",
        )
    ids = [record.get("question_id") for record in records]
    if None not in ids:
        order = {question.question_id: i for i, question in enumerate(questions)}
        places = [order.get(question_id) for question_id in ids]
        if None in places or len(set(places)) != len(places):
            at = next(i for i, p in enumerate(places) if p is None or p in places[:i])
            kind = "belongs to no question" if places[at] is None else "occurs twice"
            raise InputError(
                f"{path}, record {at + 1}: question_id {ids[at]!r} {kind}.",
                advice="Give the question file the answers were made with.",
            )
        records = [record for _, record in sorted(zip(places, records, strict=True), key=_first)]
    answers = []
    for number, (record, question) in enumerate(zip(records, questions, strict=True), start=1):
        text = record.get("text", record.get("answer"))
        if record.get("error") or not isinstance(text, str):
            raise InputError(
                f"{path}: question {number} has no answer "
                f"({record.get('error') or 'no text in field text or answer'}).",
                advice="Repeat the failed questions, then score again.",
            )
        if record.get("question", question.text) != question.text:
            raise InputError(
                f"{path}: answer {number} is about {record['question']!r}, the question is "
                f"{question.text!r}.",
                advice="Give the question file the answers were made with.",
            )
        answers.append(text)
    return answers


def _first(pair: tuple[int, Any]) -> int:
    return pair[0]
