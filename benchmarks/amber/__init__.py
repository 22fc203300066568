"""AMBER: invented objects in descriptions, and yes/no questions on existence, attribute, relation.

Paper: Wang et al., "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination
Evaluation", arXiv 2311.07397. Two choices are part of the metric's name, as in
``amber/exact/normalised``: how words of a description are compared (`amber_words.SIMILARITIES`)
and whether yes/no answers are reduced to their first word (`READINGS`).

Descriptions: CHAIR (invented / counted nouns, lower is better), Cover (named / true objects), Hal
(descriptions with an invention), Cog (named / annotated hallucinations). Yes/no questions: the
positive class is **no**, so recall is the share of no-questions that were denied, and a model that
always says no has recall 1. All existence questions have the answer no: there precision is 1 as
soon as one was denied, and says nothing.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

from benchmarks.amber.answers import answer_text, normalise, question_of
from benchmarks.amber.counts import ASPECTS, directions, ratios, row
from benchmarks.amber.data import EVALUATIONS, GENERATIVE, shipped_questions
from benchmarks.amber.official import amber_score, printed
from benchmarks.amber.words import Description, Similarity, describe, similarity
from benchmarks.base import CountTable, Mark, Sample, Scores
from benchmarks.run import Item, Task
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.amber.data import Question

__all__ = ["READINGS", "Reading", "score_stored", "task"]

Reading = Literal["normalised", "raw"]
"""Yes/no answers by their first word (ours), or the bare words only (the authors' script)."""

READINGS: tuple[str, ...] = get_args(Reading)


def task(questions: Sequence[Question], folder: Path, *, suffix: str = "") -> Task:
    """The requests: every query as it is.

    Args:
        questions: What is asked, in this order.
        folder: Where the pictures are.
        suffix: Put after the yes/no questions; AMBER itself adds nothing.

    Raises:
        InputError: If there are no questions.
    """
    if not questions:
        raise InputError("There are no questions to ask.", advice="Give at least one.")
    items = tuple(
        Item(
            Request(
                str(question.id),
                (folder / question.image,),
                question.text + ("" if question.type == GENERATIVE else suffix),
            ),
            question.facts(),
        )
        for question in questions
    )
    return Task("amber", items)


@dataclass(frozen=True)
class _Answer:
    """A stored answer with everything that was found out about it."""

    id: str
    question: Question
    text: str
    read: str
    description: Description | None

    @property
    def correct(self) -> bool | None:
        if self.description is not None:
            return not any(self.description.invented)
        return None if self.said is None else self.said == self.question.label

    @property
    def said(self) -> str | None:
        return {"Yes": "yes", "No": "no"}.get(self.read)


def score_stored(
    lines: Sequence[Mapping[str, Any]],
    *,
    evaluation: str | None = None,
    near: Similarity | None = None,
    answers: Reading = "normalised",
) -> Scores:
    """Scores the lines that `mmlm bench amber` stores, or `amber_answers.match_answers` makes.

    Args:
        lines: The answers; lines with an error are left out and counted.
        evaluation: Which part to score (`amber_data.EVALUATIONS`). Default: all there is.
        near: How words of descriptions are compared. Default: equality (``exact``).
        answers: How yes/no answers are read. ``raw`` is what the authors' script makes of them.

    Returns:
        The scores; ``official`` holds what the authors' script prints, ``details`` the AMBER score
        ((100 - CHAIR) + F1) / 2 of the printed values, as papers compute it. The unit of the
        bootstrap is the picture.

    Raises:
        ValueError: If an option has a value that does not exist.
        InputError: If a line is damaged or there twice, or no answer is left.
    """
    if answers not in READINGS:
        raise ValueError(f"Unknown reading {answers!r}; there are: {', '.join(READINGS)}.")
    if evaluation is not None and evaluation not in EVALUATIONS:
        raise ValueError(f"Unknown evaluation {evaluation!r}; there are: {', '.join(EVALUATIONS)}.")
    near = near or similarity()
    found, failed = _answers(lines, evaluation, near, answers)
    parts = {answer.question.dimension for answer in found}
    evaluation = evaluation or _evaluation(parts)
    table = CountTable.build(
        [answer.question.image for answer in found],
        [row(answer.question, answer.said, answer.description) for answer in found],
        ratios(parts),
    )
    totals = {name: int(count) for name, count in table.sums().items()}
    official = printed(totals, evaluation)
    details: dict[str, Any] = {"evaluation": evaluation}
    if (value := amber_score(official)) is not None:
        details["amber_score"] = value
    return Scores(
        name=_name(found, near, answers),
        table=table,
        directions=directions(table.ratios),
        good=("covered", *(f"{aspect}.correct" for aspect in ASPECTS)),
        bad=("invented",),
        samples=[_sample(answer) for answer in found],
        official=official,
        statuses=_statuses(found, failed, evaluation),
        details=details,
    )


def _answers(
    lines: Sequence[Mapping[str, Any]], evaluation: str | None, near: Similarity, reading: str
) -> tuple[list[_Answer], int]:
    """The answers of an evaluation, and how many requests failed."""
    found: list[_Answer] = []
    seen: set[int] = set()
    failed = 0
    for number, line in enumerate(lines, start=1):
        place = f"Line {number}"
        question = question_of(line, place)
        if question.id in seen:
            raise InputError(
                f"{place}: question {question.id} is answered twice.",
                advice="Keep one answer for each question.",
            )
        seen.add(question.id)
        if evaluation is not None and question.dimension not in EVALUATIONS[evaluation]:
            continue
        if line.get("error"):
            failed += 1
            continue
        text = answer_text(line, "text", place)
        description = None
        if question.type == GENERATIVE:
            description = describe(text, question.truth, question.hallu, near)
        read = normalise(text) if reading == "normalised" else text
        identifier = str(line.get("id", question.id))
        found.append(_Answer(identifier, question, text, read, description))
    if not found:
        raise InputError(
            f"There are no answers to score: {len(lines)} lines, {failed} of them failed.",
            advice="Repeat the run, or choose another evaluation.",
        )
    return found, failed


def _evaluation(parts: set[str]) -> str:
    """The smallest evaluation that holds all parts."""
    return min(
        (name for name, held in EVALUATIONS.items() if parts <= {*held}),
        key=lambda name: len(EVALUATIONS[name]),
    )


def _name(found: Sequence[_Answer], near: Similarity, reading: str) -> str:
    """Only what played a part is named: similarity of descriptions, reading of yes/no answers."""
    official = {question.id: question for question in shipped_questions()}
    own = all(official.get(answer.question.id) == answer.question for answer in found)
    kinds = {answer.description is None for answer in found}
    parts = ["amber" if own else "amber-custom"]
    if False in kinds:
        parts.append(near.name)
    if True in kinds:
        parts.append(reading)
    return "/".join(parts)


def _statuses(found: Sequence[_Answer], failed: int, evaluation: str) -> dict[str, int]:
    """What was not plainly scored; zero counts are left out, except those people look for."""
    wanted = sum(q.dimension in EVALUATIONS[evaluation] for q in shipped_questions())
    counts = Counter(
        {
            "neither yes nor no": sum(a.description is None and a.said is None for a in found),
            "read as yes or no": sum(a.read != a.text for a in found if a.description is None),
            "descriptions without a counted noun": sum(
                a.description is not None and not a.description.nouns for a in found
            ),
            "failed": failed,
            "not asked": max(0, wanted - len(found) - failed),
        }
    )
    return {name: count for name, count in counts.items() if count}


def _sample(answer: _Answer) -> Sample:
    question, seen = answer.question, answer.description
    marks: tuple[Mark, ...] = ()
    if seen is None:
        read = f"read as {answer.said}" if answer.said else "neither yes nor no"
        note = f"expected {question.label}, {read}"
    else:
        covered, invented = sum(seen.covered), sum(seen.invented)
        note = f"{invented} invented, {covered} of {len(seen.covered)} objects named"
        marks = tuple(
            Mark(noun.start, noun.end, "bad" if bad else "good", noun.word)
            for noun, bad in zip(seen.nouns, seen.invented, strict=True)
        )
    return Sample(
        answer.id, question.image, question.text, answer.text, answer.correct, note, marks
    )
