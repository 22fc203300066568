"""``mmlm score mmir``: score stored answers; those in words may be judged first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.bench.mmir import MmirJudge, judge_of, judged_lines
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreMmir"]


@dataclass(frozen=True)
class ScoreMmir(ScoreOptions):
    """Options of ``mmlm score mmir``.

    Attributes:
        file: Answers of `mmlm bench mmir`, judged or not. Verdicts that stand beside the answers
            are used.
        template: The judge's prompt, with {} for the elements and for the answer, in this order.
        judge: Who turns answers in words into ids; by default nobody is asked. Verdicts are
            written to <file>.judged.jsonl.
    """

    template: Path | None = None
    judge: MmirJudge = field(default_factory=MmirJudge)


def run(settings: ScoreMmir, terminal: Terminal) -> int:
    """Scores answers to MMIR."""
    from benchmarks import mmir
    from benchmarks.judges import judged

    judge = None if settings.judge.kind == "none" else judge_of(settings.judge, "open", terminal)

    def score(path: Path) -> tuple[Scores, int]:
        lines = judged_lines(judged.read_answers(path), judge, settings.template, path)
        scores = mmir.score_stored(lines)
        missing = scores.statuses.get("failed", 0) + scores.statuses.get("not judged", 0)
        return scores, missing

    return show(settings, terminal, score)


COMMAND = Command(
    summary="score answers to MMIR, as ids or judged",
    settings=ScoreMmir,
    run=run,
    positional=("file",),
    example=(
        "mmlm score mmir bench/mmir/answers.jsonl --judge match\n"
        "mmlm score mmir bench/mmir/answers.jsonl --judge openai --judge.model o1-mini"
    ),
)
