"""``mmlm bench chair``: caption pictures and count invented objects."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.pictures import DataOptions, find

if TYPE_CHECKING:
    from benchmarks.chair import ChairResult
    from benchmarks.run import Task

__all__ = ["COMMAND", "BenchChair"]


@dataclass(frozen=True)
class BenchChair(BenchOptions):
    """Options of ``mmlm bench chair``.

    Attributes:
        prompt: The question. Default: "Please describe this image in detail.", for the world
            "describe the image in detail .".
        variant: Word procedure of the scorer; part of the metric's name.
        data: Which pictures.
    """

    prompt: str | None = None
    variant: Literal["wordnet", "pattern"] = "wordnet"
    data: DataOptions = field(default_factory=DataOptions)


def run(settings: BenchChair, terminal: Terminal) -> int:
    """Captions pictures and scores CHAIR."""
    from benchmarks import chair, tables

    source = find(settings.data, settings.folder("chair") / "pictures")
    prompt = settings.prompt or source.prompt

    def task() -> Task:
        drawn = source.draw(terminal.progress)
        return chair.task(drawn.pictures, drawn.folder, prompt, settings.variant)

    def score(lines: Sequence[Mapping[str, Any]]) -> ChairResult:
        truth = source.draw(terminal.progress).truth(settings.variant)
        return chair.score_stored(lines, truth, settings.variant, expected=truth.keys())

    plan = Plan(
        benchmark="chair",
        scorer=f"chair/{settings.variant}",
        data={**source.description, "prompt": prompt},
        task=task,
        score=score,
        file="captions.jsonl",
        information=source.truth_files(),
        table=tables.chair_table,
    )
    return run_plan(settings, terminal, plan)


COMMAND = Command(
    summary="caption pictures and count invented objects",
    settings=BenchChair,
    run=run,
    example=(
        'mmlm bench chair --method "VHR(alpha=2.0)" --output runs/vhr\n'
        "mmlm bench chair --model llava-hf/llava-1.5-7b-hf --images val2014 --subset opera500"
    ),
)
