"""``mmlm bench swapmix``: exchange what a question is not about, and see whether answers move."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.pictures import DataOptions, Source, find
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.run import Task

__all__ = ["COMMAND", "BenchSwapmix"]


@dataclass(frozen=True)
class BenchSwapmix(BenchOptions):
    """Options of ``mmlm bench swapmix``.

    Attributes:
        level: `world`: the picture is painted again with one object exchanged; needs the embedded
            world.
        swaps: Changes of each kind; of objects and their looks, for each object that the question
            is not about. Numbers with different --swaps must not be compared.
        kinds: What is changed. `noise` and `clutter` show what changes without any swap.
        questions: Types of questions. `caption`: every object that a caption names is a question
            of its own; takes much longer.
        data: Which pictures.
    """

    level: Literal["world"] = "world"
    swaps: int = 5
    kinds: tuple[Literal["object", "attribute", "noise", "clutter"], ...] = field(
        default=("object", "attribute", "noise", "clutter"), metadata={"alias": "--kind"}
    )
    questions: tuple[Literal["existence", "count", "relation", "caption"], ...] = field(
        default=("existence", "count", "relation"), metadata={"alias": "--question"}
    )
    data: DataOptions = field(default_factory=DataOptions)


def run(settings: BenchSwapmix, terminal: Terminal) -> int:
    """Asks about untouched and changed pictures, and scores how often answers move."""
    from benchmarks import swapmix

    _check(settings)
    source = find(settings.data, settings.folder("swapmix") / "pictures")
    task = _painted(settings, source, terminal)
    plan = Plan(
        benchmark="swapmix",
        scorer=f"swapmix/{settings.level}",
        data={
            **source.description,
            "level": settings.level,
            "swaps": settings.swaps,
            "kinds": sorted(settings.kinds),
            "questions": sorted(settings.questions),
        },
        task=task,
        score=swapmix.score_stored,
        information=source.truth_files(),
    )
    return run_plan(settings, terminal, plan)


def _check(settings: BenchSwapmix) -> None:
    if settings.swaps < 1:
        raise InputError(f"--swaps is {settings.swaps}.", advice="Ask for at least 1.")
    for option, given in (("--kind", settings.kinds), ("--question", settings.questions)):
        if not given or len(set(given)) != len(given):
            raise InputError(
                f"{option} is {', '.join(given) or 'empty'}.",
                advice="Give it once for each, and no value twice.",
            )


def _painted(settings: BenchSwapmix, source: Source, terminal: Terminal) -> Callable[[], Task]:
    from benchmarks import swapmix
    from mmlm.cli.bench.swapped_pictures import painted_questions

    if source.world is None:
        raise InputError(
            "Only the embedded world can paint its pictures again; --images are given.",
            advice="Leave --images out.",
        )
    split, seed = source.world
    folder = settings.folder("swapmix") / "pictures" / f"{split}-{seed}"

    def task() -> Task:
        asked = painted_questions(
            folder,
            split,
            seed,
            source.count,
            types=settings.questions,
            kinds=settings.kinds,
            swaps=settings.swaps,
            progress=terminal.progress,
        )
        return swapmix.task(asked, "world")

    return task


COMMAND = Command(
    summary="exchange what the question is not about: does the answer move? (SwapMix)",
    settings=BenchSwapmix,
    run=run,
    example=(
        "mmlm bench swapmix --count 100\n"
        'mmlm bench swapmix --count 100 --method "VHR()" --output runs/swapmix-vhr\n'
        "mmlm bench swapmix --count 20 --question caption"
    ),
)
