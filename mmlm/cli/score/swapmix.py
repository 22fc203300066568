"""``mmlm score swapmix``: score stored answers about untouched and changed pictures."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreSwapmix"]


@dataclass(frozen=True)
class ScoreSwapmix(ScoreOptions):
    """Options of ``mmlm score swapmix``.

    Attributes:
        file: Answers of `mmlm bench swapmix`.
    """


def run(settings: ScoreSwapmix, terminal: Terminal) -> int:
    """Scores how often answers move."""
    from benchmarks import swapmix
    from benchmarks.base import read_records

    def score(path: Path) -> tuple[Scores, int]:
        scores = swapmix.score_stored(read_records(path))
        return scores, scores.statuses.get("failed", 0)

    return show(settings, terminal, score)


COMMAND = Command(
    summary="score how often answers move when something else is exchanged (SwapMix)",
    settings=ScoreSwapmix,
    run=run,
    positional=("file",),
    example=("mmlm score swapmix runs/vhr/answers.jsonl --baseline runs/plain/answers.jsonl"),
)
