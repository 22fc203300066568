"""``mmlm data world``: pictures of the embedded world with exact truth."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmlm.cli.frame import DONE, Command, Terminal

__all__ = ["COMMAND", "World", "make_world"]


@dataclass(frozen=True)
class World:
    """Options of ``mmlm data world``.

    Attributes:
        output: A new or empty folder, or one left by the same command, which is then completed.
        count: Number of pictures; at least 1.
        split: natural (as in training), counterfactual (companions appear half as often as in
            training), heldout_style (art that was never trained on), swapped (objects of another
            theme than the background shows), or train.
        seed: Seed of the pictures; the same seed gives the same bytes. Not negative.
    """

    output: Path
    count: int = 500
    split: str = "natural"
    seed: int = 0


def make_world(settings: World, terminal: Terminal) -> int:
    """Writes pictures with truth, captions, POPE questions and conversations.

    Raises:
        InputError: If an argument is out of range or the folder holds something else.
    """
    from data_tools.world.export import write_split

    summary = write_split(
        settings.output,
        settings.split,
        settings.count,
        settings.seed,
        progress=terminal.progress,
    )
    if terminal.json:
        terminal.emit({**summary._asdict(), "output": str(summary.output)})
    else:
        terminal.note(
            f"{summary.pictures} pictures with {summary.objects} objects and 3 x "
            f"{summary.questions} POPE questions in {summary.output}."
        )
    return DONE


COMMAND = Command(
    summary="pictures of the embedded world with exact truth, in COCO format",
    settings=World,
    run=make_world,
    example="mmlm data world --count 500 --split natural --seed 0 --output world/natural",
)
