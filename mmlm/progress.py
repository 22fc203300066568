"""The progress bars of everything that takes a while: one look, one place, standard error.

Whoever draws one says whether it may be seen (`mmlm.cli.frame.Terminal.progress`: somebody looks at
standard error and did not ask for quiet); nothing is imported otherwise. ``NO_COLOR`` is rich's.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress, ProgressColumn

__all__ = ["Bar", "library_bars", "progress_bar", "tracked", "transfers"]

Item = TypeVar("Item")


class Bar:
    """What moves a progress bar; one that nobody sees does nothing.

        with progress_bar(len(records), show, "records") as bar:
            for record in records:
                bar(1)

    Args:
        progress: Where it is drawn; None for nowhere.
        task: Its number there.
    """

    def __init__(self, progress: Progress | None = None, task: Any = None) -> None:
        self._progress = progress
        self._task = task

    def __call__(self, count: int, remark: str = "") -> None:
        """Moves on by a number of records, and sets the remark at the bar's end."""
        if self._progress is None:
            return
        self._progress.update(self._task, advance=count, remark=remark)
        speed = self._progress.tasks[self._task].speed  # unknown until two steps are done
        self._progress.update(self._task, rate="" if speed is None else f"{speed:.3g}/s")

    def title(self, text: str) -> None:
        """Names what is counted from now on."""
        if self._progress is not None:
            self._progress.update(self._task, description=text)


@contextlib.contextmanager
def progress_bar(
    total: int | None,
    show: bool,
    title: str,
    *,
    done: int = 0,
    force: bool = False,
    vanishes: bool = False,
) -> Iterator[Bar]:
    """A bar on standard error with counts, times and speed.

    Args:
        total: Number of records; None if it is not known.
        show: Whether to draw it; otherwise nothing is imported.
        title: What is counted.
        done: Records that an earlier run has done; they do not count for the speed.
        force: Draw it also where standard error is no terminal.
        vanishes: Leave nothing on the screen in the end.

    Yields:
        What moves it.
    """
    if not show:
        yield Bar()
        return
    from rich.progress import MofNCompleteColumn, Progress, TextColumn

    console = _console(force)
    rate = TextColumn("{task.fields[rate]}")
    columns = _columns(
        console, MofNCompleteColumn(), rate, TextColumn("[red]{task.fields[remark]}")
    )
    with Progress(*columns, console=console, transient=vanishes) as progress:
        task = progress.add_task(title, total=total, completed=done, remark="", rate="")
        yield Bar(progress, task)


def tracked(
    items: Iterable[Item], show: bool, title: str, total: int | None = None
) -> Iterator[Item]:
    """The same items, with a bar that counts them.

    Args:
        items: Anything that can be looped over.
        show: Whether to draw the bar.
        title: What is counted.
        total: Their number. Default: ``len(items)`` if there is one.
    """
    if total is None and isinstance(items, Collection):
        total = len(items)
    with progress_bar(total, show, title) as bar:
        for item in items:
            yield item
            bar(1)


@contextlib.contextmanager
def transfers(show: bool) -> Iterator[Callable[[str, int, int | None], None]]:
    """Bars in bytes, one for each thing that is on its way.

    Args:
        show: Whether to draw them.

    Yields:
        A function of: what, its bytes so far, its bytes in all (None: not known).
    """
    if not show:
        yield lambda what, done, total: None
        return
    from rich.progress import DownloadColumn, Progress, TransferSpeedColumn

    console = _console()
    columns = _columns(console, DownloadColumn(), TransferSpeedColumn())
    with Progress(*columns, console=console) as progress:
        tasks: dict[str, Any] = {}

        def update(what: str, done: int, total: int | None) -> None:
            if what not in tasks:
                tasks[what] = progress.add_task(what, total=total)
            progress.update(tasks[what], completed=done, total=total)

        yield update


def library_bars(show: bool) -> None:
    """Makes transformers report errors only, and draw its bars (loading, saving) as ours or not.

    Args:
        show: Whether they may be seen.
    """
    from transformers.utils import logging

    def drawn(factory: Any, given: tuple[Any, ...], options: dict[str, Any]) -> Any:
        # Switched off by the user (HF_HUB_DISABLE_PROGRESS_BARS): the factory makes an empty one.
        chosen = _tqdm() if logging.is_progress_bar_enabled() else factory
        return chosen(*given, **options)

    logging.set_verbosity_error()
    logging.set_tqdm_hook(drawn if show else None)
    if not show:
        logging.disable_progress_bar()


def _console(force: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=True, force_terminal=True if force else None)


def _columns(console: Console, counts: ProgressColumn, *more: ProgressColumn) -> list[Any]:
    from rich.progress import BarColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    return [
        TextColumn("{task.description}"),
        BarColumn(bar_width=max(10, min(40, console.width - 76))),
        counts,
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        *more,
    ]


def _tqdm() -> type:
    """A class with tqdm's interface that draws our bar."""
    from tqdm.std import tqdm

    class Drawn(tqdm):
        """Counts as tqdm does."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._stack = contextlib.ExitStack()
            self._bar = Bar()
            self._shown = 0
            # "gui": tqdm leaves the drawing to the methods below.
            super().__init__(*args, **{**options, "gui": True, "leave": True})
            if not self.disable:
                title = (self.desc or "").rstrip(": ").lower()
                bar = progress_bar(self.total, True, title, vanishes=True)
                self._bar = self._stack.enter_context(bar)

        def display(self, *_: Any, **__: Any) -> bool:
            self._bar(int(self.n) - self._shown)
            self._shown = int(self.n)
            return True

        def clear(self, *_: Any, **__: Any) -> None:
            pass

        def close(self) -> None:
            if not self.disable:
                self.display()
            super().close()
            self._stack.close()

    return Drawn
