"""POPE: does a model say yes when asked for an object that is not in the picture?

Paper: Li et al., "Evaluating Object Hallucination in Large Vision-Language Models", arXiv
2305.10355 (EMNLP 2023). A score depends on two choices that papers rarely state, so both are part
of its name, as in ``pope/coco-2023-11/strict``: the version of the question files
(`benchmarks.pope_questions`) and how a free answer is read as yes or no (`PARSERS`).

The positive class is yes. Always look at all three splits and at the yes ratio: a model that says
yes to everything has recall 1 and accuracy 0.5.
"""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks import stats
from benchmarks.base import CountTable, Measure, Ratio, read_records
from benchmarks.pope_questions import (
    KINDS,
    Question,
    build_questions,
    read_questions,
    recognise,
    write_questions,
)
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "KINDS",
    "PARSERS",
    "PROMPT_SUFFIXES",
    "Parser",
    "PopeResult",
    "PopeSummary",
    "Question",
    "build_questions",
    "match_answers",
    "read_questions",
    "recognise",
    "score",
    "score_stored",
    "summarize",
    "write_questions",
]

# What the published settings put after the question.
PROMPT_SUFFIXES = {
    "none": "",
    "llava": "\nAnswer the question using a single word or phrase.",
    "vcd": " Please answer this question with one word.",
}


@dataclass(frozen=True)
class Parser:
    """How an answer is read.

    Attributes:
        name: Name under which results are published.
        read: Answer and label -> True (yes), False (no) or None (neither). Only VCD's rule looks
            at the label.
        neither_is_missed: Whether a yes-question answered with neither counts against recall.
        yes_ratio_of_labels: Whether the yes ratio is taken from the labels (lmms-eval).
    """

    name: str
    read: Callable[[str, str], bool | None] = field(repr=False)
    neither_is_missed: bool = True
    yes_ratio_of_labels: bool = False

    @property
    def metrics(self) -> dict[str, Ratio]:
        """The ratios on the counts of `PopeResult`."""
        missed = ("fn", "neither_yes") if self.neither_is_missed else ("fn",)
        said_yes = ("yes_labels",) if self.yes_ratio_of_labels else ("tp", "fp")
        return {
            "accuracy": Ratio(("tp", "tn"), ("answers",)),
            "precision": Ratio(("tp",), ("tp", "fp")),
            "recall": Ratio(("tp",), ("tp", *missed)),
            "f1": Ratio(("tp",), ("tp", "fp", "tp", *missed), 2.0, needs=("tp",)),
            "yes_ratio": Ratio(said_yes, ("answers",)),
            "unparsed": Ratio(("neither_yes", "neither_no"), ("answers",)),
        }


def _official(answer: str, label: str) -> bool:
    words = answer.partition(".")[0].replace(",", "").split(" ")
    return not {"No", "not", "no"}.intersection(words)


def _opera(answer: str, label: str) -> bool:
    words = answer.replace(".", "").replace(",", "").split(" ")
    return not any(w in ("No", "not", "no", "NO") or w.endswith("n't") for w in words)


def _vcd(answer: str, label: str) -> bool:
    answer = answer.lower().strip()
    return "yes" in answer if label == "yes" else "no" not in answer


def _lmms_eval(answer: str, label: str) -> bool | None:
    return {"yes": True, "no": False}.get(answer.lower().strip())


def _vlmevalkit(answer: str, label: str) -> bool | None:
    words = _vqa_punctuation(answer.lower()).split()
    if ("yes" in words) == ("no" in words):
        return None
    return "yes" in words


def _vqa_punctuation(text: str) -> str:
    # The VQA evaluation's rule: a mark next to a blank vanishes, one inside a word becomes a blank.
    digits_with_comma = re.search(r"\d,\d", text) is not None
    result = text
    for mark in ';/[]"{}()=+\\_-><@`,?!':
        beside_blank = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if beside_blank or digits_with_comma else " ")
    # The original passes a flag (32) where the number of substitutions stands: 32 full stops.
    return re.sub(r"\.(?!\d)", "", result, count=32)


def _strict(answer: str, label: str) -> bool | None:
    words = re.findall(r"[^\s.,;:!?]+", answer.lower())
    first = words[0].strip(string.punctuation + "‘’“”") if words else ""
    return {"yes": True, "no": False}.get(first)


PARSERS: dict[str, Parser] = {
    parser.name: parser
    for parser in (
        # Ours: the first word must be yes or no; everything else is reported, not guessed.
        Parser("strict", _strict),
        # AoiDragon/POPE and LLaVA: "NO", "None", "isn't" and the empty answer are yes.
        Parser("official", _official),
        # OPERA and PAI: the whole answer, not only its first sentence.
        Parser("opera", _opera),
        # VCD: "not" and "know" contain a "no".
        Parser("vcd", _vcd),
        # lmms-eval: "No." is neither.
        Parser("lmms-eval", _lmms_eval, neither_is_missed=False, yes_ratio_of_labels=True),
        # VLMEvalKit: yes and no as words; its headline "Overall" is F1.
        Parser("vlmevalkit", _vlmevalkit),
    )
}


@dataclass(frozen=True)
class PopeResult:
    """Scores of the answers to one question file.

    Attributes:
        parser: Name of the parser.
        version: Version of the question file, "custom" if it is none of the published.
        predictions: Per answer True (yes), False (no), None (neither).
        table: Counts per picture.
    """

    parser: str
    version: str
    predictions: tuple[bool | None, ...] = field(repr=False)
    table: CountTable = field(repr=False)

    @property
    def name(self) -> str:
        """Name under which the numbers may be published."""
        return f"pope/{self.version}/{self.parser}"

    @property
    def metrics(self) -> dict[str, float | None]:
        """Every metric as a fraction; None where undefined."""
        return {name: measure.value for name, measure in self.table.measures().items()}

    @property
    def counts(self) -> dict[str, int | float]:
        """tp, fp, tn, fn, answers that are neither (by label), answers, yes labels."""
        return self.table.sums()

    def measures(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Measure]:
        """Every metric with its counts and a 95 % bootstrap interval over pictures."""
        return self.table.measures(resamples=resamples, seed=seed)

    def as_json(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Everything but the answers, as plain JSON."""
        measures = self.measures(resamples=resamples, seed=seed)
        return {
            "metric": self.name,
            "metrics": {name: measure.as_json() for name, measure in measures.items()},
            "counts": self.counts,
        }


@dataclass(frozen=True)
class PopeSummary:
    """Scores of several splits and their means.

    Attributes:
        splits: Result of each split.
        table: Counts of all splits side by side per picture, so that a mean over splits has an
            interval; metrics are ``mean_accuracy``, ``mean_f1`` and ``mean_yes_ratio``.
    """

    splits: Mapping[str, PopeResult]
    table: CountTable = field(repr=False)

    @property
    def metrics(self) -> dict[str, float | None]:
        """The means over the splits; None if one of them is undefined."""
        return {name: measure.value for name, measure in self.table.measures().items()}

    @property
    def llava_average(self) -> float | None:
        """LLaVA's single "POPE" number: mean F1, official parser, the three legacy files.

        None for any other combination, for which the number would not be comparable.
        """
        comparable = set(self.splits) == set(KINDS) and all(
            (result.version, result.parser) == ("coco-legacy", "official")
            for result in self.splits.values()
        )
        return self.metrics["mean_f1"] if comparable else None

    def as_json(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """All splits and means as plain JSON."""
        means = self.table.measures(resamples=resamples, seed=seed)
        record = {
            "splits": {
                name: result.as_json(resamples=resamples, seed=seed)
                for name, result in self.splits.items()
            },
            "means": {name: measure.as_json() for name, measure in means.items()},
        }
        if self.llava_average is not None:
            record["llava_average"] = self.llava_average
        return record


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


def summarize(splits: Mapping[str, PopeResult]) -> PopeSummary:
    """Puts the results of several splits side by side and adds their means.

    Raises:
        ValueError: If there is no split, or the parsers differ.
    """
    if len({result.parser for result in splits.values()}) != 1:
        raise ValueError("A summary needs at least one split, and one parser for all of them.")
    rule = PARSERS[next(iter(splits.values())).parser]
    tables = {name: result.table for name, result in splits.items()}
    images = sorted({image for table in tables.values() for image in table.images}, key=str)
    columns = [f"{split}.{name}" for split, table in tables.items() for name in table.columns]
    counts = np.zeros((len(images), len(columns)))
    row = {image: i for i, image in enumerate(images)}
    start = 0
    for table in tables.values():
        rows = [row[image] for image in table.images]
        counts[rows, start : start + len(table.columns)] = table.counts
        start += len(table.columns)
    means = {
        f"mean_{metric}": tuple(rule.metrics[metric].prefixed(split) for split in tables)
        for metric in ("accuracy", "f1", "yes_ratio")
    }
    return PopeSummary(dict(splits), CountTable(tuple(columns), tuple(images), counts, means))


def score_stored(
    lines: Sequence[Mapping[str, Any]], parser: str = "strict"
) -> tuple[PopeSummary, int]:
    """Scores the lines that `mmlm bench pope` stores: split, version, image, label, text.

    Returns:
        The summary, and the number of lines that hold an error instead of an answer; those are
        left out.

    Raises:
        InputError: If a line lacks a field, or no answer is left.
    """
    splits: dict[str, list[Mapping[str, Any]]] = {}
    failed = 0
    for number, line in enumerate(lines, start=1):
        if line.get("error"):
            failed += 1
            continue
        needed = ("split", "version", "image", "label", "text")
        if missing := [name for name in needed if not isinstance(line.get(name), str)]:
            raise InputError(
                f"Line {number} has no {missing[0]!r}.",
                advice="Score files of `mmlm bench pope`, or give the question file as well.",
            )
        splits.setdefault(line["split"], []).append(line)
    if not splits:
        raise InputError(f"All {failed} lines hold errors.", advice="Repeat the run.")
    results = {
        split: score(
            [line["text"] for line in answered],
            [line["label"] for line in answered],
            parser,
            images=[line["image"] for line in answered],
            version="+".join(sorted({line["version"] for line in answered})),
        )
        for split, answered in splits.items()
    }
    return summarize(results), failed


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
