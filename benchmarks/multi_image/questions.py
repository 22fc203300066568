"""What the multi-image benchmarks ask: questions, marks of pictures, requests, foreign answers."""

from __future__ import annotations

import os
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_json
from benchmarks.run import Item, Task
from benchmarks.stored import content_hash
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = [
    "Question",
    "check_ids",
    "digest",
    "join_answers",
    "read_answers_by_id",
    "make_task",
    "mark_pictures",
]

_MARK = re.compile(r"<image(?: (\d+))?>")


@dataclass(frozen=True)
class Question:
    """A question about several pictures.

    Attributes:
        id: Its id in the data set.
        subject: Subject, sub-task or kind; accuracies are also given for each.
        prompt: What the model is asked.
        pictures: The files, in the order in which they are shown.
        label: The right answer; None if it is kept secret.
        options: The options' texts; empty for an open question.
        marked: Whether the prompt marks the places of the pictures; else they come first.
        text: The question as the data set has it.
        facts: Whatever else scoring must know.
    """

    id: str
    subject: str
    prompt: str
    pictures: tuple[Path, ...]
    label: str | tuple[str, ...] | None
    options: tuple[str, ...] = ()
    marked: bool = False
    text: str = ""
    facts: Mapping[str, Any] = field(default_factory=dict)

    def stored(self, benchmark: str, split: str, root: Path) -> dict[str, Any]:
        """The facts that go into the stored line; pictures are named from ``root`` on."""
        names = [path.relative_to(root).as_posix() for path in self.pictures]
        return {
            "benchmark": benchmark,
            "split": split,
            "subject": self.subject,
            "image": names[0] if names else "",
            "images": names,
            "question": self.text,
            "options": list(self.options),
            "label": list(self.label) if isinstance(self.label, tuple) else self.label,
            **self.facts,
        }


def _root(questions: Sequence[Question]) -> Path:
    """The folder that holds the pictures of all questions."""
    folders = {path.parent for question in questions for path in question.pictures}
    return Path(os.path.commonpath(folders)) if folders else Path()


def mark_pictures(text: str, n_pictures: int, place: str) -> tuple[str, bool]:
    """Numbers the bare ``<image>`` marks of a text, if it has any.

    Returns:
        The text, and whether it marks the places of its pictures.

    Raises:
        InputError: If there are marks, but not one for each picture.
    """
    pieces = text.split("<image>")
    if len(pieces) == 1:
        return text, False
    if len(pieces) - 1 != n_pictures:
        raise InputError(
            f"{place}: the question marks {len(pieces) - 1} pictures, but has {n_pictures}.",
            advice="Correct the row, or leave it out.",
        )
    numbered = (f"<image {number}>{piece}" for number, piece in enumerate(pieces[1:], start=1))
    return pieces[0] + "".join(numbered), True


def check_ids(questions: Sequence[Question]) -> None:
    """Refuses an empty list and double ids.

    Raises:
        InputError: Names the id.
    """
    if not questions:
        raise InputError("There are no questions to ask.", advice="Check --data and --split.")
    name, count = Counter(question.id for question in questions).most_common(1)[0]
    if count > 1:
        raise InputError(
            f"The question id {name!r} occurs {count} times.",
            advice="Give one split of one data set, or correct the file.",
        )


def make_task(benchmark: str, split: str, variant: str, questions: Sequence[Question]) -> Task:
    """The requests of a benchmark.

    Raises:
        InputError: If there are none, or two have the same id.
    """
    check_ids(questions)
    root = _root(questions)
    items = tuple(
        Item(
            Request(one.id, one.pictures, one.prompt, marked=one.marked),
            one.stored(benchmark, split, root),
        )
        for one in questions
    )
    return Task(f"{benchmark}/{split}/{variant}", items)


def digest(task: Task) -> str:
    """A hash of all that is asked and known: ids, prompts, options, labels, names of pictures."""
    return content_hash([[i.request.id, i.request.prompt, dict(i.facts)] for i in task.items])


def read_answers_by_id(
    path: Path, benchmark: str, split: str, questions: Sequence[Question], example: str
) -> list[dict[str, Any]]:
    """Reads a JSON object of answers by question id, as lines to score.

    Args:
        path: The file.
        benchmark: Its benchmark.
        split: Its split.
        questions: What was asked; all of it must be answered, and nothing else.
        example: How such a file looks, for the message.

    Raises:
        InputError: If it is no such file, or not about exactly these questions.
    """
    answers = read_json(path)
    if not isinstance(answers, dict):
        raise InputError(
            f"{path} holds a {type(answers).__name__}, not answers by question id.",
            advice=f"It should look like {example}.",
        )
    return join_answers(benchmark, split, questions, answers)


def join_answers(
    benchmark: str, split: str, questions: Sequence[Question], answers: Mapping[str, str]
) -> list[dict[str, Any]]:
    """Answers that were written elsewhere, as lines to score.

    Args:
        benchmark: The benchmark.
        split: The split.
        questions: Its questions.
        answers: Answer by question id.

    Raises:
        InputError: If an answer is missing, belongs to no question, or is no text.
    """
    check_ids(questions)
    missing = [one.id for one in questions if one.id not in answers]
    unknown = sorted(answers.keys() - {one.id for one in questions})
    if missing or unknown:
        example = missing[0] if missing else unknown[0]
        raise InputError(
            f"{len(missing)} questions have no answer and {len(unknown)} answers belong to no "
            f"question, e.g. {example!r}.",
            advice="Give the data and the split that the answers were made with.",
        )
    root = _root(questions)
    lines = []
    for one in questions:
        if not isinstance(answers[one.id], str):
            raise InputError(
                f"The answer to {one.id!r} is {answers[one.id]!r}, not a text.",
                advice="Repeat the question.",
            )
        fact = one.stored(benchmark, split, root)
        lines.append({"id": one.id, **fact, "prompt": one.prompt, "text": answers[one.id]})
    return lines
