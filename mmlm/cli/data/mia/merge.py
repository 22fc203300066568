"""``mmlm data mia merge``: shards put together, all pairs in one shuffled file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmlm.cli.frame import DONE, Command, Terminal

__all__ = ["COMMAND", "Merge", "merge_run", "run"]


@dataclass(frozen=True)
class Merge:
    """Options of ``mmlm data mia merge``.

    Attributes:
        output: Folder of the run.
        seed: Seed of the order of the pairs.
    """

    output: Path
    seed: int = 0


def run(settings: Merge, terminal: Terminal) -> int:
    """Merges.

    Raises:
        InputError: If a stage is missing, or is not finished.
    """
    pairs = merge_run(settings.output, settings.seed, terminal)
    if terminal.json:
        terminal.emit({"output": str(settings.output), "pairs": pairs})
    return DONE


def merge_run(root: Path, seed: int, terminal: Terminal) -> int:
    """Puts all stages together.

    Returns:
        The number of pairs.
    """
    from data_tools.mia.merging import merge

    merged = merge(root, seed)
    for name, count in merged.shards.items():
        terminal.note(f"{name}: shards put together, {count} records")
    terminal.note(f"{merged.pairs} pairs in {merged.output}")
    return merged.pairs


COMMAND = Command(
    summary="put shards of all stages together, and all pairs into one shuffled file",
    settings=Merge,
    run=run,
    positional=("output",),
    example="mmlm data mia merge mia",
)
