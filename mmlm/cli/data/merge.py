"""``mmlm data merge``: puts the shards of a pipeline's output together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from mmlm.cli.frame import DONE, Command, Terminal

__all__ = ["COMMAND", "MergeData", "run"]


@dataclass(frozen=True)
class MergeData:
    """Options of ``mmlm data merge``.

    Attributes:
        folder: The --output of the shards; the merged files are written beside theirs.
    """

    folder: Path


def run(settings: MergeData, terminal: Terminal) -> int:
    """Merges and says how many lines each file has.

    Raises:
        InputError: If shards are missing, unfinished or at work; nothing is written then.
    """
    from data_tools.done import DONE as FINISHED
    from data_tools.merging import merge_shards

    counts = merge_shards(settings.folder)
    records = counts.pop(FINISHED)
    if terminal.json:
        terminal.emit({"output": str(settings.folder), "records": records, "lines": counts})
        return DONE
    for kind, count in counts.items():
        terminal.say(f"{settings.folder / kind}.jsonl: {count} lines")
    terminal.note(f"{records} records, sorted by id. The shards' files may be deleted now.")
    return DONE


COMMAND = Command(
    summary="put the shards of a pipeline's output together",
    settings=MergeData,
    run=run,
    positional=("folder",),
    example="mmlm data merge out/sentinel",
)
