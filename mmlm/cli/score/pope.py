"""``mmlm score pope``: score stored yes/no answers about objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.pope import PopeSummary
    from benchmarks.pope.questions import Question

__all__ = ["COMMAND", "ScorePope"]


@dataclass(frozen=True)
class ScorePope(ScoreOptions):
    """Options of ``mmlm score pope``.

    Attributes:
        file: Answers: the output of `mmlm bench pope`, or, with --questions, JSON lines with
            `answer` or `text`.
        questions: The question file the answers belong to: a path, or the name of one that ships
            with mmlm, e.g. coco-2023-11/random.
        parser: How answers are read as yes or no; part of the metric's name.
        export: Folder for the answers and question files in the format of the authors' script.
    """

    questions: str | None = None
    parser: Literal["strict", "official", "opera", "vcd", "lmms-eval", "vlmevalkit"] = "strict"
    export: Path | None = None


def run(settings: ScorePope, terminal: Terminal) -> int:
    """Scores yes/no answers."""
    from benchmarks import pope, tables
    from benchmarks.base import read_records

    if settings.export is not None:
        if settings.questions is not None:
            raise InputError(
                "--export is given with --questions: these answers have the authors' format.",
                advice="Leave out one of the two.",
            )
        written = pope.write_official(settings.export, read_records(settings.file))
        terminal.note(f"{len(written)} files written to {settings.export}.")
    return show(settings, terminal, lambda path: _pope(path, settings), table=tables.pope_table)


def _pope(path: Path, settings: ScorePope) -> PopeSummary | tuple[PopeSummary, int]:
    from benchmarks import pope
    from benchmarks.base import read_records

    if settings.questions is not None:
        questions, version, split = _questions(settings.questions)
        return pope.score_answers(path, questions, settings.parser, version=version, split=split)
    summary = pope.score_stored(read_records(path), settings.parser)
    return summary, summary.statuses.get("failed", 0)


def _questions(name: str) -> tuple[Sequence[Question], str, str]:
    """The questions, their version and split: of a file, or of those that ship with mmlm."""
    from benchmarks import pope

    version, _, kind = name.partition("/")
    if version in pope.VERSIONS and not Path(name).exists():
        if kind not in pope.KINDS:
            raise InputError(
                f"{version} has no questions of the kind {kind!r}.",
                advice=f"Write {version}/KIND; the kinds are {', '.join(pope.KINDS)}.",
            )
        return pope.published(version)[kind], version, kind
    questions = pope.read_questions(name)
    version, split = pope.recognise(questions) or ("custom", "all")
    return questions, version, split


COMMAND = Command(
    summary="score yes/no answers about objects",
    settings=ScorePope,
    run=run,
    positional=("file",),
    example=(
        "mmlm score pope bench/pope/answers.jsonl --parser official\n"
        "mmlm score pope bench/pope/answers.jsonl --export official\n"
        "mmlm score pope answers.jsonl --questions coco-2023-11/random"
    ),
)
