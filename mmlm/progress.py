"""The progress bar of everything that works through many records."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(
    total: int, show: bool, title: str, *, done: int = 0, force: bool = False
) -> Iterator[Callable[[int, str], None]]:
    """A bar on standard error with counts, times and speed.

    Args:
        total: Number of records.
        show: Whether to draw it; otherwise nothing is imported.
        title: What is counted.
        done: Records that an earlier run has done; they do not count for the speed.
        force: Draw it also where standard error is no terminal.

    Yields:
        A function that advances the bar by a number of records and sets the remark at its end.
    """
    if not show:
        yield lambda count, remark: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    console = Console(stderr=True, force_terminal=True if force else None)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=max(10, min(40, console.width - 76))),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[rate]}"),
        TextColumn("[red]{task.fields[remark]}"),
    )
    with Progress(*columns, console=console) as bar:
        task = bar.add_task(title, total=total, completed=done, remark="", rate="")

        def advance(count: int, remark: str) -> None:
            bar.update(task, advance=count, remark=remark)
            speed = bar.tasks[0].speed  # unknown until two steps are done
            bar.update(task, rate="" if speed is None else f"{speed:.3g}/s")

        yield advance
