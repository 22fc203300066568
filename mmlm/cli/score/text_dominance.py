"""``mmlm score text-dominance``: MDI and AEI of stored runs that were measured."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreTextDominance"]


@dataclass(frozen=True)
class ScoreTextDominance(ScoreOptions):
    """Options of ``mmlm score text-dominance``.

    Attributes:
        text: Which tokens are the text: `all` of the prompt but visual ones, or `instruction`,
            those behind the last image.
        first_token: Whether the prompt's first token, an attention sink, is counted.
    """

    text: Literal["all", "instruction"] = "all"
    first_token: bool = True


def run(settings: ScoreTextDominance, terminal: Terminal) -> int:
    """Scores a run; beside a baseline it says what a fall of MDI means."""
    from benchmarks.base import read_records
    from benchmarks.text_dominance import NOTE, rebalanced, score_stored

    scored: list[Scores] = []

    def score(path: Path) -> tuple[Scores, int]:
        scores = score_stored(read_records(path), settings.text, settings.first_token)
        scored.append(scores)
        return scores, scores.statuses["failed"]

    code = show(settings, terminal, score)
    terminal.note(NOTE)
    if settings.baseline is not None:
        after, before = scored
        for stage, verdict in rebalanced(before, after).items():
            terminal.note(f"{stage} layers: {verdict}.")
    return code


COMMAND = Command(
    summary="score attention on text and picture that was measured with the answers",
    settings=ScoreTextDominance,
    run=run,
    positional=("file",),
    example=(
        "mmlm score text-dominance runs/plain/answers.jsonl --text instruction\n"
        "mmlm score text-dominance runs/vhr/answers.jsonl --baseline runs/plain/answers.jsonl"
    ),
)
