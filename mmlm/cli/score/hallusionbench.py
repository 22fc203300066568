"""``mmlm score hallusionbench``: score stored answers; may have them judged first."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.judging import JudgeOptions, open_judge
from mmlm.cli.score.common import ScoreOptions, show

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "ScoreHallusionbench"]


@dataclass(frozen=True)
class ScoreHallusionbench(ScoreOptions):
    """Options of ``mmlm score hallusionbench``.

    Attributes:
        file: Answers of `mmlm bench hallusionbench`, judged or not, or the authors' result file
            (with `model_prediction`, perhaps with verdicts). Verdicts that stand beside the
            answers are used.
        variant: `judge`: a judge's verdicts; `yesno`: the words yes and no; `auto`: `judge` if
            there are verdicts. Part of the metric's name.
        reviewer: Name of the judge in the authors' file; part of the metric's name.
        export: File to which the answers are written for the authors' evaluation.py.
        template: The judge's prompt, with {} for question, reference answer and answer, in this
            order; by default a wording of our own.
        same_template: The prompt that compares two answers, with {} for each.
        judge: Who compares the answers with the references; by default nobody is asked. Verdicts
            are written to <file>.judged.jsonl.
    """

    variant: Literal["auto", "yesno", "judge"] = "auto"
    reviewer: str = "official-file"
    export: Path | None = None
    template: Path | None = None
    same_template: Path | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)


def run(settings: ScoreHallusionbench, terminal: Terminal) -> int:
    """Scores answers."""
    from benchmarks import hallusionbench
    from benchmarks.judges import judged

    templates = hallusionbench.read_templates(settings.template, settings.same_template)
    judge = open_judge(settings.judge, terminal, temperature=1.0)

    def score(path: Path) -> tuple[Scores, int]:
        lines = hallusionbench.read_answers(path, settings.reviewer)
        if judge is not None:
            lines = hallusionbench.judge_answers(lines, judge, *templates)
            judged.write_judged(judged.judged_path(path), lines)
        if settings.export is not None and path == settings.file:
            hallusionbench.write_official(settings.export, lines)
        variant = settings.variant
        if variant == "auto":
            variant = "yesno" if judged.judge_of(lines) is None else "judge"
        scores = hallusionbench.score_stored(lines, variant)
        return scores, scores.statuses["failed"] + scores.statuses["not judged"]

    return show(settings, terminal, score)


COMMAND = Command(
    summary="score answers to HallusionBench, by yes and no or by a judge's verdicts",
    settings=ScoreHallusionbench,
    run=run,
    positional=("file",),
    example=(
        "mmlm score hallusionbench bench/hallusionbench/answers.jsonl\n"
        "mmlm score hallusionbench answers.jsonl --judge openai --judge.model gpt-4\n"
        "mmlm score hallusionbench HallusionBench_result.json --reviewer gpt-4"
    ),
)
