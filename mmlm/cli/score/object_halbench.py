"""``mmlm score object-halbench``: count invented objects in stored descriptions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.halbench import ReadingOptions, Scorer, scorer
from mmlm.cli.score.common import ScoreOptions, show
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreObjectHalbench"]


@dataclass(frozen=True, kw_only=True)
class ScoreObjectHalbench(ReadingOptions, ScoreOptions):
    """Options of ``mmlm score object-halbench``.

    Attributes:
        file: Answers of `mmlm bench object-halbench`; with --official, of the authors' scripts.
        official: The file has the authors' format: image_id, question or prompt, answer or text.
        data: The question file, for answers in the authors' format that lack image_id.
        export: Write the answers in the authors' format to this file, to score them there too.
    """

    official: bool = False
    data: Path | None = None
    export: Path | None = None


def run(settings: ScoreObjectHalbench, terminal: Terminal) -> int:
    """Scores stored answers; a judge is asked only if one is named."""
    if settings.data is not None and not settings.official:
        raise InputError(
            "--data is used for answers in the authors' format only.", advice="Add --official."
        )
    score = scorer(settings, terminal)

    def one(path: Path) -> tuple[Scores, int]:
        return _score(settings, score, path, export=path == settings.file)

    return show(settings, terminal, one)


def _score(
    settings: ScoreObjectHalbench, score: Scorer, path: Path, *, export: bool
) -> tuple[Scores, int]:
    from benchmarks.object_halbench.files import write_official

    lines = _lines(settings, path)
    if export and settings.export is not None:
        write_official(settings.export, lines)
    scores = score(lines, path)
    return scores, len(lines) - int(scores.table.sums()["answers"])


def _lines(settings: ScoreObjectHalbench, path: Path) -> Sequence[Mapping[str, Any]]:
    from benchmarks.judges import judged
    from benchmarks.object_halbench import files as halbench_files

    if not settings.official:
        return judged.read_answers(path)
    questions = None if settings.data is None else halbench_files.read_questions(settings.data)
    return halbench_files.read_official(path, questions)


COMMAND = Command(
    summary="count invented objects in detailed descriptions",
    settings=ScoreObjectHalbench,
    run=run,
    positional=("file",),
    example=(
        "mmlm score object-halbench bench/object-halbench/answers.jsonl\n"
        "mmlm score object-halbench answers.jsonl --judge openai --judge.model gpt-3.5-turbo\n"
        "mmlm score object-halbench obj_halbench_answer.jsonl --official --phrases spacy"
    ),
)
