"""``mmlm bench text-dominance``: caption pictures and measure what the answers attend to."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.pictures import DataOptions, find
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.run import Task

__all__ = ["COMMAND", "BenchTextDominance"]


@dataclass(frozen=True)
class BenchTextDominance(BenchOptions):
    """Options of ``mmlm bench text-dominance``.

    Attributes:
        prompt: The question. Default: "Please describe this image in detail.", for the world
            "describe the image in detail .".
        text: Which tokens are the text: `all` of the prompt but visual ones, or `instruction`,
            those behind the last image.
        first_token: Whether the prompt's first token, an attention sink, is counted.
        data: Which pictures.
    """

    prompt: str | None = None
    text: Literal["all", "instruction"] = "all"
    first_token: bool = True
    data: DataOptions = field(default_factory=DataOptions)


def run(settings: BenchTextDominance, terminal: Terminal) -> int:
    """Captions pictures with the probe attached and scores MDI and AEI."""
    from benchmarks import tables, text_dominance
    from mmlm import TextDominance

    if settings.generate.num_beams > 1:
        raise InputError(
            "Attention cannot be measured under beam search: beams change places.",
            advice="Leave --generate.num_beams at 1.",
        )
    source = find(settings.data, settings.folder("text-dominance") / "pictures")
    prompt = settings.prompt or source.prompt

    def task() -> Task:
        drawn = source.draw(terminal.progress)
        return text_dominance.task(drawn.pictures, drawn.folder, prompt)

    plan = Plan(
        benchmark="text-dominance",
        scorer=text_dominance.name_of(settings.text, settings.first_token),
        data={**source.description, "prompt": prompt},
        task=task,
        score=lambda lines: text_dominance.score_stored(lines, settings.text, settings.first_token),
        information=source.truth_files(),
        table=tables.scores_table,
        methods=(TextDominance(),),
    )
    return run_plan(settings, terminal, plan)


COMMAND = Command(
    summary="caption pictures and measure whether answers attend to text or picture",
    settings=BenchTextDominance,
    run=run,
    example=(
        "mmlm bench text-dominance --count 100 --output runs/plain\n"
        'mmlm bench text-dominance --count 100 --method "VHR()" --output runs/vhr'
    ),
)
