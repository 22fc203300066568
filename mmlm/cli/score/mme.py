"""``mmlm score mme``: score stored answers to MME's hallucination subset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreMme"]


@dataclass(frozen=True)
class ScoreMme(ScoreOptions):
    """Options of ``mmlm score mme``.

    Attributes:
        file: Answers of `mmlm bench mme`, or a folder of result files for MME's own evaluation
            tool (existence.txt, count.txt, position.txt, color.txt).
        export: Folder to which the answers are written for MME's own evaluation tool.
    """

    export: Path | None = None


def run(settings: ScoreMme, terminal: Terminal) -> int:
    """Scores answers."""
    from benchmarks import mme
    from benchmarks.base import read_records

    def score(path: Path) -> tuple[Scores, int]:
        lines = mme.read_official(path) if path.is_dir() else read_records(path)
        scores = mme.score_stored(lines)
        if settings.export is not None and path == settings.file:
            mme.write_official(settings.export, lines)
        return scores, scores.statuses["failed"]

    return show(settings, terminal, score)


COMMAND = Command(
    summary="score answers to MME's hallucination subset",
    settings=ScoreMme,
    run=run,
    positional=("file",),
    example=(
        "mmlm score mme bench/mme/answers.jsonl\n"
        "mmlm score mme Your_Results --baseline LaVIN_Results"
    ),
)
