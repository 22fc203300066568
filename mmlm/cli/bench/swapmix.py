"""``mmlm bench swapmix``: exchange what a question is not about, and see whether answers move."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

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
            world. `features`: what the decoder gets for the object's image tokens comes from
            another picture; for any model whose tokens are known to lie in the picture, and any
            pictures with boxes. Measures less, and is no substitute for the other.
        swaps: Changes of each kind; of objects and their looks, for each object that the question
            is not about. Numbers with different --swaps must not be compared.
        kinds: What is changed; by default everything that the level knows. `noise` and `clutter`,
            of the world only, show what changes without any swap.
        questions: Types of questions; by default all but captions. `relation` and `caption` are of
            the world only. `caption`: every object that a caption names is a question of its own;
            takes much longer.
        data: Which pictures.
    """

    level: Literal["world", "features"] = "world"
    swaps: int = 5
    kinds: tuple[Literal["object", "attribute", "noise", "clutter"], ...] = field(
        default=(), metadata={"alias": "--kind"}
    )
    questions: tuple[Literal["existence", "count", "relation", "caption"], ...] = field(
        default=(), metadata={"alias": "--question"}
    )
    data: DataOptions = field(default_factory=DataOptions)


_KNOWN = {
    "world": (
        ("object", "attribute", "noise", "clutter"),
        ("existence", "count", "relation", "caption"),
    ),
    "features": (("object", "attribute"), ("existence", "count")),
}
"""What each level can change, and what it can be asked."""


def run(settings: BenchSwapmix, terminal: Terminal) -> int:
    """Asks about untouched and changed pictures, and scores how often answers move."""
    from benchmarks import swapmix

    kinds, questions = _chosen(settings)
    source = find(settings.data, settings.folder("swapmix") / "pictures")
    painted = settings.level == "world"
    make = _painted if painted else _replaced
    plan = Plan(
        benchmark="swapmix",
        scorer=f"swapmix/{settings.level}",
        data={
            **source.description,
            "level": settings.level,
            "swaps": settings.swaps,
            "kinds": sorted(kinds),
            "questions": sorted(questions),
        },
        task=make(settings, source, terminal, kinds, questions),
        score=swapmix.score_stored,
        information=source.truth_files(),
        task_sees_model=not painted,
    )
    return run_plan(settings, terminal, plan)


def _chosen(settings: BenchSwapmix) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What is changed and asked.

    Raises:
        InputError: If a value is given twice, or the level does not know it.
    """
    if settings.swaps < 1:
        raise InputError(f"--swaps is {settings.swaps}.", advice="Ask for at least 1.")
    known_kinds, known_questions = _KNOWN[settings.level]
    for option, given, known in (
        ("--kind", settings.kinds, known_kinds),
        ("--question", settings.questions, known_questions),
    ):
        if len(set(given)) != len(given):
            raise InputError(f"{option} is {', '.join(given)}.", advice="Give no value twice.")
        if foreign := [value for value in given if value not in known]:
            raise InputError(
                f"--level {settings.level} knows no {option} {foreign[0]}.",
                advice=f"Take {' or '.join(known)}, or --level world.",
            )
    questions = settings.questions or tuple(q for q in known_questions if q != "caption")
    return settings.kinds or known_kinds, questions


def _painted(
    settings: BenchSwapmix,
    source: Source,
    terminal: Terminal,
    kinds: Sequence[str],
    questions: Sequence[str],
) -> Callable[[], Task]:
    """Makes the requests about pictures that are painted again."""
    from benchmarks import swapmix
    from mmlm.cli.bench.swapped_pictures import painted_questions

    if source.world is None:
        raise InputError(
            "Only the embedded world can paint its pictures again; --images are given.",
            advice="Leave --images out, or take --level features.",
        )
    split, seed = source.world
    folder = settings.folder("swapmix") / "pictures" / f"{split}-{seed}"

    def task() -> Task:
        asked = painted_questions(
            folder,
            split,
            seed,
            source.count,
            types=questions,
            kinds=kinds,
            swaps=settings.swaps,
            progress=terminal.progress,
        )
        return swapmix.task(asked, "world")

    return task


def _replaced(
    settings: BenchSwapmix,
    source: Source,
    terminal: Terminal,
    kinds: Sequence[str],
    questions: Sequence[str],
) -> Callable[[Any, Any], Task]:
    """Makes the requests about pictures whose features are replaced."""
    from mmlm.cli.bench.swapped_features import feature_task

    if source.world is None and not source.files[0]:
        raise InputError(
            "The boxes of the objects are missing.",
            advice="Give --annotations instances.json in COCO format.",
        )

    def task(model: Any, processor: Any) -> Task:
        return feature_task(
            model,
            processor,
            source.draw(terminal.progress),
            settings.folder("swapmix"),
            types=questions,
            kinds=kinds,
            swaps=settings.swaps,
            seed=settings.data.seed,
            progress=terminal.progress,
        )

    return task


COMMAND = Command(
    summary="exchange what the question is not about: does the answer move? (SwapMix)",
    settings=BenchSwapmix,
    run=run,
    example=(
        "mmlm bench swapmix --count 100\n"
        'mmlm bench swapmix --count 100 --method "VHR()" --output runs/swapmix-vhr\n'
        "mmlm bench swapmix --count 20 --question caption\n"
        "mmlm bench swapmix --level features --model llava-hf/llava-1.5-7b-hf --images val2014 "
        "--annotations instances_val2014.json --count 100"
    ),
)
