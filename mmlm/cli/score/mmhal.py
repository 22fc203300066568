"""``mmlm score mmhal``: score stored answers to MMHal-Bench; may have them judged first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.judging import JudgeOptions, open_judge
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreMmhal"]


@dataclass(frozen=True)
class ScoreMmhal(ScoreOptions):
    """Options of ``mmlm score mmhal``.

    Attributes:
        file: Answers of `mmlm bench mmhal`, judged or not, or the official question file with
            `model_answer`. Verdicts that stand beside the answers are used.
        reviews: With an official file: the judge's replies, as eval_gpt_mmhal.py writes them.
        reviewer: Name of the judge who wrote them; part of the metric's name.
        export: File to which the answers are written for the official scripts.
        template: The judge's prompt, with {} for objects, question, reference answer and answer,
            in this order; by default a wording of our own.
        judge: Who rates the answers; by default nobody is asked. Verdicts are written to
            <file>.judged.jsonl.
    """

    reviews: Path | None = None
    reviewer: str = "official-file"
    export: Path | None = None
    template: Path | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)


def run(settings: ScoreMmhal, terminal: Terminal) -> int:
    """Scores answers."""
    from benchmarks import mmhal
    from benchmarks.judges import judged

    template = mmhal.JUDGE_TEMPLATE
    if settings.template is not None:
        template = judged.read_template(settings.template, mmhal.JUDGE_PARTS)
    judge = open_judge(settings.judge, terminal, temperature=0.0)

    def score(path: Path) -> tuple[Scores, int]:
        own = path == settings.file
        lines = mmhal.read_answers(path, settings.reviews if own else None, settings.reviewer)
        if settings.export is not None and own:
            mmhal.write_official(settings.export, lines, mmhal.read_questions())
        if judge is not None:
            lines = mmhal.judge_answers(lines, judge, template)
            judged.write_judged(judged.judged_path(path), lines)
        scores = mmhal.score_stored(lines)
        return scores, scores.statuses["failed"] + scores.statuses["not judged"]

    return show(settings, terminal, score)


COMMAND = Command(
    summary="score answers to MMHal-Bench, with a judge or its stored verdicts",
    settings=ScoreMmhal,
    run=run,
    positional=("file",),
    example=(
        "mmlm score mmhal bench/mmhal/answers.jsonl --judge openai --judge.model gpt-4-0314\n"
        "mmlm score mmhal bench/mmhal/answers.judged.jsonl\n"
        "mmlm score mmhal answers.json --reviews answers.mmhal_test_eval.json"
    ),
)
