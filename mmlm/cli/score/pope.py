"""``mmlm score pope``: score stored yes/no answers about objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from benchmarks.pope import PopeSummary

__all__ = ["COMMAND", "ScorePope"]


@dataclass(frozen=True)
class ScorePope(ScoreOptions):
    """Options of ``mmlm score pope``.

    Attributes:
        file: Answers: the output of `mmlm bench pope`, or, with --questions, JSON lines with
            `answer` or `text`.
        questions: The question file the answers belong to.
        parser: How answers are read as yes or no; part of the metric's name.
    """

    questions: Path | None = None
    parser: Literal["strict", "official", "opera", "vcd", "lmms-eval", "vlmevalkit"] = "strict"


def run(settings: ScorePope, terminal: Terminal) -> int:
    """Scores yes/no answers."""
    from benchmarks import tables

    return show(settings, terminal, lambda path: _pope(path, settings), table=tables.pope_table)


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


COMMAND = Command(
    summary="score yes/no answers about objects",
    settings=ScorePope,
    run=run,
    positional=("file",),
    example=(
        "mmlm score pope bench/pope/answers.jsonl --parser official\n"
        "mmlm score pope answers.jsonl --questions coco_pope_random.json"
    ),
)
