"""What all scoring commands share: scores for people and programs, and the change to a baseline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, SOME_FAILED, Terminal

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.base import Scored

__all__ = ["ScoreOptions", "show"]


@dataclass(frozen=True)
class ScoreOptions:
    """Options of every scorer.

    Attributes:
        file: The stored answers.
        baseline: Answers to the same requests to compare with, e.g. those of the plain model.
        strict: Refuse to score if an answer is missing, failed or unread, or a metric undefined.
    """

    file: Path
    baseline: Path | None = None
    strict: bool = False


def show(
    settings: ScoreOptions,
    terminal: Terminal,
    score: Callable[[Path], Scored | tuple[Scored, int]],
    *,
    table: Callable[[Any], Table] | None = None,
) -> int:
    """Scores a file, and its baseline if there is one, and shows both.

    Args:
        settings: The files.
        terminal: Where the scores go.
        score: Reads and scores a file; may also tell how many requests have no answer.
        table: Shows the scores; by default `benchmarks.tables.scores_table`.

    Returns:
        ``DONE``, or ``SOME_FAILED`` if some requests have no answer.
    """
    from benchmarks import tables
    from benchmarks.complete import require_complete

    result, failed = _with_count(score(settings.file))
    before = None if settings.baseline is None else _with_count(score(settings.baseline))[0]
    if settings.strict:
        require_complete(result)
    if failed:
        terminal.note(f"{failed} requests have no answer and are left out.")
    terminal.table((table or tables.scores_table)(result))
    record = result.as_json() | {"failed": failed}
    if before is not None:
        terminal.table(tables.change_table(before.table, result.table))
        changes = {
            name: before.table.difference(result.table, name) for name in before.table.ratios
        }
        record["change"] = {
            name: {
                "value": change.value,
                "interval": change.interval and [change.interval.low, change.interval.high],
            }
            for name, change in changes.items()
        }
    if terminal.json:
        terminal.emit(record)
    return SOME_FAILED if failed else DONE


def _with_count(scored: Scored | tuple[Scored, int]) -> tuple[Scored, int]:
    return scored if isinstance(scored, tuple) else (scored, 0)
