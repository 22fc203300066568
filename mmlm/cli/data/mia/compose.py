"""``mmlm data mia compose``: questions about several pictures from questions about one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from data_tools.mia.planning import ComposeSettings
from mmlm.cli.data.mia.common import StageOptions, open_output, report, run_step
from mmlm.cli.frame import Command, Terminal
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections import Counter

    from data_tools.mia.sources import Sources

__all__ = ["COMMAND", "Compose", "SourceOptions", "compose", "run"]


@dataclass(frozen=True)
class SourceOptions:
    """Where questions about one picture come from: a file, or the embedded world.

    Attributes:
        file: JSON lines or a JSON list with `id`, `image`, `question` and `answer`, or in LLaVA's
            or Hugging Face's conversation format.
        images: Folder of the pictures; by default that of the file.
        turns: Of a conversation take the first question, or all of them, each as its own record.
        boxes: Keep records that speak of boxes in coordinates; they are wrong in another picture.
        world: Make so many scenes of the embedded world instead of reading a file.
        split: Split of the world.
        seed: Seed of the scenes.
    """

    file: Path | None = field(default=None, metadata={"alias": "--sources"})
    images: Path | None = None
    turns: Literal["first", "all"] = "first"
    boxes: bool = False
    world: int = 0
    split: str = "natural"
    seed: int = 0


@dataclass(frozen=True)
class Compose:
    """Options of ``mmlm data mia compose``.

    Attributes:
        output: Folder of the run; all stages write into it.
        source: Where questions about one picture come from.
        compose: How they become questions about several.
        stage: Shard, and what to do with an earlier run.
    """

    output: Path
    source: SourceOptions = field(default_factory=SourceOptions)
    compose: ComposeSettings = field(default_factory=ComposeSettings)
    stage: StageOptions = field(default_factory=StageOptions)


def run(settings: Compose, terminal: Terminal) -> int:
    """Composes.

    Raises:
        InputError: If the sources cannot be read, are too few, or the output is another run's.
    """
    counts = compose(settings.output, settings.source, settings.compose, settings.stage, terminal)
    return report(terminal, settings.output, {"compose": counts})


def compose(
    root: Path,
    source: SourceOptions,
    settings: ComposeSettings,
    stage: StageOptions,
    terminal: Terminal,
) -> Counter[str]:
    """Runs the stage.

    Returns:
        Records per status.
    """
    from data_tools.mia.compose import Composer
    from data_tools.mia.planning import plan
    from data_tools.mia.records import COMPOSE
    from data_tools.mia.sources import digest

    sources = _sources(root, source, terminal)
    planned = plan(sources.items, settings)
    skipped = sources.skipped + type(sources.skipped)(long_answer=planned.too_long)
    if left_out := ", ".join(f"{n} {name}" for name, n in sorted(skipped.items()) if n):
        terminal.note(f"sources left out: {left_out}")
    run = {"sources": digest(sources.items), "compose": dataclasses.asdict(settings)}
    output = open_output(root, COMPOSE, run, stage, total=len(planned.records))
    return run_step(COMPOSE, Composer(root, planned, settings), planned.records, output, terminal)


def _sources(root: Path, options: SourceOptions, terminal: Terminal) -> Sources:
    from data_tools.mia.sources import read_sources, world_sources

    if (options.file is None) == (options.world == 0):
        raise InputError(
            "Sources are a file or scenes of the embedded world, one of both.",
            advice="Give --sources FILE.jsonl or --source.world COUNT.",
        )
    if options.file is not None:
        return read_sources(options.file, options.images, turns=options.turns, boxes=options.boxes)
    return world_sources(
        root / "world",
        options.world,
        split=options.split,
        seed=options.seed,
        progress=terminal.progress,
    )


COMMAND = Command(
    summary="questions about one picture become questions about one of several",
    settings=Compose,
    run=run,
    example=(
        "mmlm data mia compose --source.world 50 --source.turns all --compose.style world \\\n"
        '    --compose.sequence "{2: 1}" --output mia\n'
        "mmlm data mia compose --sources llava_v1_5_mix665k.json --source.images data/llava \\\n"
        "    --output mia --compose.picture_format jpeg"
    ),
)
