"""The one progress bar: what it draws, what it leaves alone, and that libraries' bars become it."""

import io
import subprocess
import sys

import pytest
from rich.console import Console
from rich.text import Text
from transformers.utils import logging

import mmlm.progress
from mmlm.progress import library_bars, progress_bar, tracked, transfers


@pytest.fixture
def screen(monkeypatch):
    """What is drawn, on a terminal of 120 columns; gives a function that reads the last lines."""
    stream = io.StringIO()

    def console(force=False):
        return Console(file=stream, force_terminal=True, width=120, color_system="standard")

    monkeypatch.setattr(mmlm.progress, "_console", console)
    return lambda: stream.getvalue()


def plain(shown):
    return Text.from_ansi(shown.replace("\r", "\n")).plain


def test_nothing_is_imported_for_a_bar_that_nobody_sees():
    code = (
        "import sys; from mmlm.progress import *\n"
        "with progress_bar(3, False, 'x') as bar: bar(1); bar(1, 'remark'); bar.title('y')\n"
        "with transfers(False) as update: update('x', 1, None)\n"
        "assert list(tracked([1, 2], False, 'x')) == [1, 2]\n"
        "assert 'rich' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_a_bar(screen):
    with progress_bar(4, True, "captions", done=1) as bar:
        bar(1, "one failed")
        bar(1)
        bar.title("questions")
        bar(1, "two failed")
    last = plain(screen()).strip().splitlines()[-1]
    assert last.startswith("questions")
    assert "4/4" in last
    assert "two failed" in last
    assert "captions" in plain(screen())


def test_a_bar_that_vanishes(screen):
    with progress_bar(2, True, "loading", vanishes=True) as bar:
        bar(2)
    # The cursor goes up and the line is deleted.
    assert screen().rstrip().endswith("\x1b[1A\x1b[2K")


@pytest.mark.parametrize("items", [[1, 2, 3], iter([1, 2, 3])])
def test_tracked(screen, items):
    total = None if isinstance(items, list) else 3
    assert list(tracked(items, True, "things", total)) == [1, 2, 3]
    assert "3/3" in plain(screen())


def test_tracked_ends_its_bar_when_the_loop_is_left(screen):
    steps = tracked([1, 2, 3], True, "things")
    next(steps)
    steps.close()
    assert screen().endswith("\x1b[?25h")  # the cursor is shown again


def test_transfers(screen):
    with transfers(True) as update:
        update("a.zip", 500, 2000)
        update("b.zip", 1, None)
        update("a.zip", 2000, 2000)
    shown = plain(screen())
    assert "2.0/2.0 kB" in shown
    assert "b.zip" in shown


class TestLibraries:
    @pytest.fixture(autouse=True)
    def _restored(self):
        enabled, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
        yield
        logging.set_tqdm_hook(None)
        logging.set_verbosity(verbosity)
        (logging.enable_progress_bar if enabled else logging.disable_progress_bar)()

    def test_their_bars_are_drawn_as_ours(self, screen, capsys):
        logging.enable_progress_bar()
        library_bars(True)
        with logging.tqdm(total=149, desc="Loading weights") as bar:
            bar.set_postfix({"tensor": "x"})
            for _ in range(149):
                bar.update(1)
        assert list(logging.tqdm([1, 2], desc="Shards: ")) == [1, 2]
        shown = plain(screen())
        assert "loading weights" in shown
        assert "149/149" in shown
        assert "shards" in shown
        assert capsys.readouterr().err == ""

    def test_quiet(self, screen, capsys):
        library_bars(True)
        library_bars(False)
        with logging.tqdm(total=2, desc="Loading") as bar:
            bar.update(2)
        assert screen() == ""
        assert capsys.readouterr().err == ""
        library_bars(True)  # what was switched off stays so
        with logging.tqdm(total=2, desc="Loading") as bar:
            bar.update(2)
        assert screen() == ""


def test_no_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    console = mmlm.progress._console(force=True)
    assert console.no_color
