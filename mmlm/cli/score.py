"""``mmlm score``: score stored answers again, without the model."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal
from mmlm.errors import InputError
from mmlm.records import INFORMATION, run_record_path

if TYPE_CHECKING:
    from benchmarks.base import CountTable
    from benchmarks.chair import ChairResult
    from benchmarks.pope import PopeSummary

__all__ = ["COMMANDS", "ScoreChair", "ScorePope"]


@dataclass(frozen=True)
class ScoreChair:
    """Options of ``mmlm score chair``.

    Attributes:
        file: Captions: JSON lines or a JSON list with `image_id` and `caption`, or the output of
            `mmlm generate` if its ids are image ids.
        annotations: Objects in the pictures (instances.json in COCO format; repeatable). Default:
            those of the run that wrote the captions; else COCO val2014, which ships with mmlm.
        references: Reference captions (captions.json in COCO format; repeatable).
        variant: Word procedure; part of the metric's name.
        baseline: Captions of the same pictures to compare with, e.g. those of the plain model.
    """

    file: Path
    annotations: tuple[Path, ...] = field(default=(), metadata={"alias": "--annotations"})
    references: tuple[Path, ...] = field(default=(), metadata={"alias": "--references"})
    variant: Literal["wordnet", "pattern"] = "wordnet"
    baseline: Path | None = None


@dataclass(frozen=True)
class ScorePope:
    """Options of ``mmlm score pope``.

    Attributes:
        file: Answers: the output of `mmlm bench pope`, or, with --questions, JSON lines with
            `answer` or `text`.
        questions: The question file the answers belong to.
        parser: How answers are read as yes or no; part of the metric's name.
        baseline: Answers to the same questions to compare with.
    """

    file: Path
    questions: Path | None = None
    parser: Literal["strict", "official", "opera", "vcd", "lmms-eval", "vlmevalkit"] = "strict"
    baseline: Path | None = None


def run_chair(settings: ScoreChair, terminal: Terminal) -> int:
    """Scores captions."""
    from benchmarks import chair, tables

    captions = chair.read_captions(settings.file)
    truth = _truth(settings)
    unknown = {caption["image_id"] for caption in captions} - truth.keys()
    if captions and len(unknown) == len({caption["image_id"] for caption in captions}):
        raise InputError(
            f"None of the {len(unknown)} pictures in {settings.file} is in the annotations.",
            advice="Give the --annotations that belong to these captions.",
        )
    result = chair.score(captions, truth, settings.variant)
    baseline: ChairResult | None = None
    if settings.baseline is not None:
        earlier = chair.read_captions(settings.baseline)
        baseline = chair.score(earlier, truth, settings.variant)
    if unknown:
        terminal.note(
            f"{len(unknown)} pictures are not in the annotations: all their objects count as "
            f"invented, e.g. those of {min(unknown)}."
        )
    _report(
        terminal,
        result.as_json(),
        tables.chair_table(result),
        None if baseline is None else (baseline.table, result.table),
    )
    return DONE


def run_pope(settings: ScorePope, terminal: Terminal) -> int:
    """Scores yes/no answers."""
    from benchmarks import tables

    summary, failed = _pope(settings.file, settings)
    baseline = None if settings.baseline is None else _pope(settings.baseline, settings)[0]
    if failed:
        terminal.note(f"{failed} questions have no answer and are left out.")
    _report(
        terminal,
        summary.as_json() | {"failed": failed},
        tables.pope_table(summary),
        None if baseline is None else (baseline.table, summary.table),
    )
    return SOME_FAILED if failed else DONE


def _report(
    terminal: Terminal,
    scores: Mapping[str, Any],
    table: Any,
    pair: tuple[CountTable, CountTable] | None,
) -> None:
    from benchmarks import tables

    terminal.table(table)
    record = dict(scores)
    if pair is not None:
        before, after = pair
        terminal.table(tables.change_table(before, after))
        changes = {name: before.difference(after, name) for name in before.ratios}
        record["change"] = {
            name: {
                "value": change.value,
                "interval": change.interval and [change.interval.low, change.interval.high],
            }
            for name, change in changes.items()
        }
    if terminal.json:
        terminal.emit(record)


def _truth(settings: ScoreChair) -> dict[int, set[str]]:
    from benchmarks import chair

    if settings.annotations:
        return chair.truth_from_coco(settings.annotations, settings.references, settings.variant)
    if settings.references:
        raise InputError(
            "--references is given without --annotations.", advice="Give the instances as well."
        )
    stored = _files_of_run(settings.file)
    if stored["annotations"]:
        return chair.truth_from_coco(stored["annotations"], stored["references"], settings.variant)
    return chair.truth_of_val2014()


def _files_of_run(path: Path) -> dict[str, list[str]]:
    """The annotation files named in the run record beside the captions, if there is one."""
    record = run_record_path(path)
    information: Mapping[str, Any] = {}
    if record.is_file():
        information = json.loads(record.read_text(encoding="utf-8")).get(INFORMATION, {})
    return {name: list(information.get(name, ())) for name in ("annotations", "references")}


def _pope(path: Path, settings: ScorePope) -> tuple[PopeSummary, int]:
    from benchmarks import pope
    from benchmarks.base import read_records

    if settings.questions is None:
        return pope.score_stored(read_records(path), settings.parser)
    questions = pope.read_questions(settings.questions)
    known = pope.recognise(questions)
    version, split = known or ("custom", "all")
    result = pope.score(
        pope.match_answers(path, questions),
        [question.label for question in questions],
        settings.parser,
        images=[question.image for question in questions],
        version=version,
    )
    return pope.summarize({split: result}), 0


COMMANDS = {
    "chair": Command(
        summary="count invented objects in captions",
        settings=ScoreChair,
        run=run_chair,
        positional=("file",),
        example=(
            "mmlm score chair bench/chair/captions.jsonl\n"
            "mmlm score chair with_method.jsonl --baseline plain.jsonl --variant pattern"
        ),
    ),
    "pope": Command(
        summary="score yes/no answers about objects",
        settings=ScorePope,
        run=run_pope,
        positional=("file",),
        example=(
            "mmlm score pope bench/pope/answers.jsonl --parser official\n"
            "mmlm score pope answers.jsonl --questions coco_pope_random.json"
        ),
    ),
}
