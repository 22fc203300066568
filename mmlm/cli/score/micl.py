"""``mmlm score micl``: answers to the procedural tasks of ``mmlm data micl``."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND"]


@dataclass(frozen=True)
class ScoreMicl(ScoreOptions):
    """Options of ``mmlm score micl``."""


def run(settings: ScoreMicl, terminal: Terminal) -> int:
    """Scores stored answers.

    Raises:
        InputError: If the file holds no answers to episodes.
    """
    from benchmarks import micl
    from benchmarks.base import read_records

    def score(path: Path) -> tuple[Scores, int]:
        lines = read_records(path)
        return micl.score_stored(lines), sum(bool(line.get("error")) for line in lines)

    return show(settings, terminal, score)


COMMAND = Command(
    summary="score answers to tasks that need their demonstrations (mmlm data micl)",
    settings=ScoreMicl,
    run=run,
    positional=("file",),
    example="mmlm score micl answers.jsonl --baseline zero-shot.jsonl",
)
