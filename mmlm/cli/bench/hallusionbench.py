"""``mmlm bench hallusionbench``: pictures and their manipulated twins."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.judging import JudgeOptions, open_judge
from mmlm.cli.official import given_or_official

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "BenchHallusionbench"]


@dataclass(frozen=True)
class BenchHallusionbench(BenchOptions):
    """Options of ``mmlm bench hallusionbench``.

    Attributes:
        images: The authors' folder of figures, with VD and VS in it; by default where `mmlm data
            fetch hallusionbench-images` puts it.
        data: Questions in the format of HallusionBench.json; by default the published ones.
        template: The judge's prompt, with {} for question, reference answer and answer, in this
            order; by default a wording of our own.
        same_template: The prompt that compares two answers, with {} for each.
        judge: Who compares the answers with the references. Without a judge the words yes and no
            are looked for.
    """

    images: Path | None = field(default=None, metadata={"alias": "--images"})
    data: Path | None = field(default=None, metadata={"alias": "--data"})
    template: Path | None = None
    same_template: Path | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)


def run(settings: BenchHallusionbench, terminal: Terminal) -> int:
    """Asks the questions, has the answers judged if a judge is named, and scores them."""
    from benchmarks import hallusionbench
    from benchmarks.judges import judged
    from benchmarks.stored import content_hash
    from mmlm.records import file_hash

    folder = given_or_official("images", settings.images, "hallusionbench-images")
    entries = hallusionbench.read_entries(settings.data)
    figures = hallusionbench.find_figures(entries, folder)
    templates = hallusionbench.read_templates(settings.template, settings.same_template)
    judge = open_judge(settings.judge, terminal, temperature=1.0)
    scorer = "hallusionbench/yesno" if judge is None else f"hallusionbench/judge:{judge.name}"
    answers = settings.folder("hallusionbench") / "answers.jsonl"

    def score(lines: Sequence[Mapping[str, Any]]) -> Scores:
        if judge is None:
            return hallusionbench.score_stored(lines)
        lines = hallusionbench.judge_answers(lines, judge, *templates)
        judged.write_judged(judged.judged_path(answers), lines)
        return hallusionbench.score_stored(lines, "judge")

    plan = Plan(
        benchmark="hallusionbench",
        scorer=scorer,
        data={
            "questions": content_hash([asdict(entry) for entry in entries]),
            "pictures": content_hash({name: file_hash(path) for name, path in figures.items()}),
        },
        task=lambda: hallusionbench.task(entries, folder),
        score=score,
        information={"folder": str(folder)},
    )
    return run_plan(settings, terminal, plan)


COMMAND = Command(
    summary="yes/no questions about pictures and their manipulated twins",
    settings=BenchHallusionbench,
    run=run,
    example=(
        "mmlm bench hallusionbench --model llava-hf/llava-1.5-7b-hf --images hallusion_bench\n"
        "mmlm bench hallusionbench --images hallusion_bench --judge openai --judge.model gpt-4"
    ),
)
