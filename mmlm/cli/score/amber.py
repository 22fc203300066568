"""``mmlm score amber``: score stored descriptions and yes/no answers."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreAmber"]


@dataclass(frozen=True)
class ScoreAmber(ScoreOptions):
    """Options of ``mmlm score amber``.

    Attributes:
        file: Answers: the output of `mmlm bench amber`, or the authors' format, a JSON list of
            `id` and `response`.
        data: Folder `data` of the authors' repository, if answers in their format are about
            other questions than those that ship with mmlm.
        partial: Accept answers in the authors' format to a part of the questions.
        evaluation: Score only a part: `g`, `d`, `de`, `da` or `dr`; `a`: everything.
        similarity: How words of descriptions are compared; part of the metric's name. `exact`:
            equal words; `spacy`: the authors' vectors (needs spaCy's en_core_web_lg).
        answers: How yes/no answers are read. `normalised`: by their first word; `raw`: bare
            `Yes` and `No` only, as the authors' script does.
        export: Write the answers in the authors' format, for their inference.py; yes/no answers
            as --answers says.
    """

    data: Path | None = None
    partial: bool = False
    evaluation: Literal["a", "g", "d", "de", "da", "dr"] = "a"
    similarity: Literal["exact", "spacy"] = "exact"
    answers: Literal["normalised", "raw"] = "normalised"
    export: Path | None = None


def run(settings: ScoreAmber, terminal: Terminal) -> int:
    """Scores answers to AMBER's questions."""
    from benchmarks import amber
    from benchmarks.amber.answers import write_official
    from benchmarks.amber.words import similarity

    near = similarity(settings.similarity)

    def score(path: Path) -> tuple[Scores, int]:
        result = amber.score_stored(
            _lines(path, settings),
            evaluation=None if settings.evaluation == "a" else settings.evaluation,
            near=near,
            answers=settings.answers,
        )
        return result, result.statuses.get("failed", 0)

    if settings.export is not None:
        if not settings.export.parent.is_dir():
            raise InputError(
                f"There is no folder {str(settings.export.parent)!r} for --export.",
                advice="Create it, or choose another file.",
            )
        lines = _lines(settings.file, settings)
        write_official(settings.export, lines, normalised=settings.answers == "normalised")
        terminal.note(f"{len(lines)} answers written to {settings.export}.")
    return show(settings, terminal, score)


def _lines(path: Path, settings: ScoreAmber) -> list[dict[str, Any]]:
    """Stored lines, or answers in the authors' format with their questions."""
    from benchmarks.amber.answers import match_answers
    from benchmarks.amber.data import read_questions
    from benchmarks.base import read_records

    records = read_records(path)
    if not any("response" in record for record in records):
        return records
    return match_answers(records, read_questions(settings.data), partial=settings.partial)


COMMAND = Command(
    summary="score descriptions and yes/no answers of AMBER",
    settings=ScoreAmber,
    run=run,
    positional=("file",),
    example=(
        "mmlm score amber bench/amber/answers.jsonl --export responses.json\n"
        "mmlm score amber responses.json --answers raw"
    ),
)
