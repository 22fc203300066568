"""``mmlm data mia sheet``: examples of a run as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.errors import InputError

if TYPE_CHECKING:
    from data_tools.mia.records import Step

__all__ = ["COMMAND", "Sheet", "run"]


@dataclass(frozen=True)
class Sheet:
    """Options of ``mmlm data mia sheet``.

    Attributes:
        output: Folder of the run.
        show: `instructions`, `pairs`, or what was `dropped`.
        count: Number of examples; every format and number of pictures comes before any is there
            twice.
        columns: Examples beside each other.
        to: The picture; by default SHOW.png in the folder of the run.
    """

    output: Path
    show: Literal["instructions", "pairs", "dropped"] = "instructions"
    count: int = 8
    columns: int = 2
    to: Path | None = None


def run(settings: Sheet, terminal: Terminal) -> int:
    """Draws the sheet.

    Raises:
        InputError: If there is nothing to show.
        ImageReadError: If a picture is missing or damaged.
    """
    from data_tools.mia.sheet import pick, sheet

    if settings.count < 1 or settings.columns < 1:
        raise InputError(
            f"{settings.count} examples in {settings.columns} columns cannot be drawn.",
            advice="Give at least one of each.",
        )
    chosen = pick(_lines(settings.output, settings.show), settings.count)
    if not chosen:
        raise InputError(f"There are no {settings.show}.", advice="Choose another --show.")
    path = settings.to or settings.output / f"{settings.show}.png"
    sheet(chosen, settings.output, columns=settings.columns).save(path)
    if terminal.json:
        terminal.emit({"output": str(path), "examples": [line["id"] for line in chosen]})
    else:
        terminal.say(str(path))
    return DONE


def _lines(root: Path, kind: str) -> list[dict[str, Any]]:
    from data_tools.mia.records import COMPOSE, FILTER

    instructions = {line["id"]: line for line in _read(root, COMPOSE, "instructions")}
    if kind == "instructions":
        return list(instructions.values())
    # Where the target is in a composed picture is said in the instruction.
    return [
        line | {"tiles": instructions[line["id"]]["tiles"]} for line in _read(root, FILTER, kind)
    ]


def _read(root: Path, step: Step, kind: str) -> list[dict[str, Any]]:
    from data_tools.done import read_kind

    return [line for _, own in read_kind(root / step.name, kind) for line in own]


COMMAND = Command(
    summary="examples of a run as a picture, the target outlined",
    settings=Sheet,
    run=run,
    positional=("output",),
    example="mmlm data mia sheet mia --count 8",
)
