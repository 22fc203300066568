"""POPE: does a model say yes when asked for an object that is not in the picture?

Paper: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv
2305.10355 (EMNLP 2023). A score depends on three choices that papers rarely state, so all are part
of its name, as in ``pope/coco-2023-11/strict`` or ``pope/coco-2023-11/chat/opera``: the version of
the question files (`benchmarks.pope.questions`), whether every question is asked alone or the six
about a picture in one conversation (``chat``, `benchmarks.pope.answers`), and how a free answer is
read as yes or no (`benchmarks.pope.parsers`).

The positive class is yes. Always look at all three splits and at the yes ratio: a model that says
yes to everything has recall 1 and accuracy 0.5.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from benchmarks.base import CountTable, Sample
from benchmarks.pope.answers import (
    match_answers,
    missing_answers,
    official_lines,
    spread,
    task,
    write_official,
)
from benchmarks.pope.parsers import PARSERS, Parser
from benchmarks.pope.questions import (
    KINDS,
    VERSIONS,
    Question,
    build_questions,
    published,
    read_questions,
    recognise,
    write_questions,
)
from benchmarks.pope.results import PopeResult, PopeSummary, summarize
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Hashable, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "KINDS",
    "PARSERS",
    "PROMPT_SUFFIXES",
    "VERSIONS",
    "Parser",
    "PopeResult",
    "PopeSummary",
    "Question",
    "build_questions",
    "match_answers",
    "official_lines",
    "published",
    "read_questions",
    "recognise",
    "score",
    "score_answers",
    "score_stored",
    "spread",
    "summarize",
    "task",
    "write_official",
    "write_questions",
]

# What the published settings put after the question.
PROMPT_SUFFIXES = {
    "none": "",
    "llava": "\nAnswer the question using a single word or phrase.",
    "vcd": " Please answer this question with one word.",
}


def score(
    answers: Sequence[str],
    labels: Sequence[str],
    parser: str = "strict",
    *,
    images: Sequence[Hashable] | None = None,
    version: str = "custom",
) -> PopeResult:
    """Scores answers against labels, pairwise in order.

    Accuracy = (TP + TN) / answers, precision = TP / (TP + FP), recall = TP / (TP + FN), yes ratio
    = (TP + FP) / answers. An answer that is neither yes nor no is wrong, counts as missed where
    the label is yes, and is reported as ``unparsed``.

    Args:
        answers: What the model said.
        labels: "yes" or "no" for each.
        parser: A name in `PARSERS`.
        images: The picture of each answer: the unit of the bootstrap. Default: each its own.
        version: Version of the question file, for the name.

    Raises:
        ValueError: If the parser is unknown.
        InputError: If the numbers of answers and labels differ (the official script silently drops
            the rest), there are none, or a label is neither yes nor no.
    """
    if parser not in PARSERS:
        raise ValueError(f"Unknown parser {parser!r}; there are: {', '.join(PARSERS)}.")
    if len(answers) != len(labels):
        raise InputError(
            f"Got {len(answers)} answers for {len(labels)} labels.",
            advice="Finish the run, or score only the questions that were asked.",
        )
    if not answers:
        raise InputError("There are no answers to score.", advice="Give at least one.")
    rule = PARSERS[parser]
    truth = [_label(label, number) for number, label in enumerate(labels, start=1)]
    predictions = tuple(
        rule.read(answer, label) for answer, label in zip(answers, truth, strict=True)
    )
    rows = [_row(said, label) for said, label in zip(predictions, truth, strict=True)]
    groups = list(range(len(rows))) if images is None else images
    return PopeResult(parser, version, predictions, CountTable.build(groups, rows, rule.metrics))


def score_stored(lines: Sequence[Mapping[str, Any]], parser: str = "strict") -> PopeSummary:
    """Scores the lines that `mmlm bench pope` stores: split, version, image, label, text.

    Lines that hold an error instead of an answer are left out and counted in
    `PopeSummary.statuses`, and so are questions of a published file that have no line.

    Raises:
        InputError: If a line lacks a field, belongs to another question file than it says, or no
            answer is left.
    """
    flat = spread(lines)
    missing = missing_answers(flat)
    splits: dict[str, list[Mapping[str, Any]]] = {}
    for line in flat:
        if not line.get("error"):
            splits.setdefault(line["split"], []).append(line)
    failed = len(flat) - sum(map(len, splits.values()))
    if not splits:
        raise InputError(f"All {failed} lines hold errors.", advice="Repeat the run.")
    summary = summarize(
        {split: _score_split(answered, parser) for split, answered in splits.items()}
    )
    counted = {"failed": failed, "missing": missing}
    return replace(summary, statuses={name: count for name, count in counted.items() if count})


def score_answers(
    path: str | Path,
    questions: Sequence[Question],
    parser: str = "strict",
    *,
    version: str = "custom",
    split: str = "all",
) -> PopeSummary:
    """Scores an answer file of the authors' format against one question file.

    Args:
        path: Answers (see `match_answers`).
        questions: The questions they belong to.
        parser: A name in `PARSERS`.
        version: Version of the questions, for the name.
        split: Name of the split.

    Raises:
        InputError: If the answers do not fit the questions.
    """
    answers = match_answers(path, questions)
    lines = [
        {
            "id": f"{split}-{question.question_id}",
            "split": split,
            "version": version,
            "image": question.image,
            "question": question.text,
            "label": question.label,
            "text": answer,
        }
        for question, answer in zip(questions, answers, strict=True)
    ]
    return summarize({split: _score_split(lines, parser)})


def _score_split(lines: Sequence[Mapping[str, Any]], parser: str) -> PopeResult:
    if len(ways := {bool(line.get("chat")) for line in lines}) > 1:
        raise InputError(
            f"The split {lines[0]['split']!r} mixes single questions and conversations.",
            advice="Score the two runs apart.",
        )
    result = score(
        [line["text"] for line in lines],
        [line["label"] for line in lines],
        parser,
        images=[line["image"] for line in lines],
        version="+".join(sorted({line["version"] for line in lines})),
    )
    samples = tuple(map(_sample, lines, result.predictions))
    return replace(result, chat=ways.pop(), samples=samples)


def _sample(line: Mapping[str, Any], said: bool | None) -> Sample:
    expected = _label(line["label"], 0)
    read = {True: "yes", False: "no", None: "neither"}[said]
    note = f"{line['split']}: expected {expected}"
    if read != expected:
        note += f", read as {read}"
    return Sample(
        id=str(line.get("id", "")),
        image=line["image"],
        question=str(line.get("question") or line.get("prompt") or ""),
        answer=line["text"],
        correct=read == expected,
        note=note,
    )


def _label(label: str, number: int) -> str:
    plain = str(label).strip().lower()
    if plain not in ("yes", "no"):
        raise InputError(
            f"Label {number} is {label!r}; allowed are 'yes' and 'no'.",
            advice="Correct the question file.",
        )
    return plain


def _row(said: bool | None, label: str) -> dict[str, int]:
    yes = label == "yes"
    return {
        "answers": 1,
        "tp": int(said is True and yes),
        "fp": int(said is True and not yes),
        "tn": int(said is False and not yes),
        "fn": int(said is False and yes),
        "neither_yes": int(said is None and yes),
        "neither_no": int(said is None and not yes),
        "yes_labels": int(yes),
    }
