"""What `mmlm chat` shows: colours while the answer comes, tables, maps; and how lines are read."""

import io

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from rich.text import Text
from tiny import picture

from data_tools.world import SPLITS, caption, scene
from mmlm.cli import chat_views as views
from mmlm.cli.chat_lines import Script, history_file, paths
from mmlm.errors import InputError
from mmlm.show.conversation import Conversation, Picture
from mmlm.show.truth import Known
from mmlm.show.words import coloured

KNOWN = Known(frozenset({"dog", "dining table"}), "by hand")


def console(**options):
    given = {"force_terminal": True, "color_system": "standard", "width": 60, "no_color": False}
    return Console(file=io.StringIO(), highlight=False, **(given | options))


def written(text, known, screen, size=3):
    view = views.Written(screen, known)
    for start in range(0, len(text), size):
        view.add(text[start : start + size])
    view.end()
    return screen.file.getvalue().removesuffix("\n")


def letters(text):
    """Every character with its style."""
    return [(c, str(text.get_style_at_offset(console(), i))) for i, c in enumerate(text.plain)]


class TestWritten:
    @pytest.mark.parametrize("index", range(6))
    def test_ends_as_if_coloured_at_once(self, index):
        truth = scene(SPLITS["natural"], 5, index, "natural")
        other = scene(SPLITS["natural"], 6, index, "natural")
        text = caption(other, np.random.default_rng(index))  # of another picture: some invented
        known = Known(frozenset(truth.classes), "the scene")
        shown = Text.from_ansi(written(text, known, console()))
        at_once = console()
        at_once.print(coloured(text, known.objects), end="", soft_wrap=True)
        assert letters(shown) == letters(Text.from_ansi(at_once.file.getvalue()))
        assert shown.plain == text

    def test_two_words_are_not_taken_for_one(self):
        # "hot" alone, or "dog" alone behind it, would be green.
        shown = written("a hot dog .", KNOWN, console())
        assert "\x1b[1;4;31mhot dog\x1b[0m" in shown

    def test_words_come_before_the_end(self):
        screen = console()
        view = views.Written(screen, KNOWN)
        view.add("a dog and a cat on a")
        assert "dog" in screen.file.getvalue()

    def test_without_truth_everything_comes_at_once(self):
        screen = console()
        view = views.Written(screen, None)
        view.add("a do")
        assert screen.file.getvalue() == "a do"

    def test_no_color_keeps_the_underline(self):
        shown = written("a dog and a cat .", KNOWN, console(no_color=True))
        assert "\x1b[1;4mcat" in shown
        assert "3" not in shown.replace("\x1b[1;4m", "")

    def test_a_pipe_gets_the_bare_text(self):
        screen = console(force_terminal=False, color_system=None)
        assert written("a [dog] and a cat .", KNOWN, screen) == "a [dog] and a cat ."

    def test_the_remark_is_no_markup(self):
        screen = console()
        view = views.Written(screen, None)
        view.end(" [stopped]")
        assert screen.file.getvalue() == " [stopped]\n"


def test_named():
    def named(text, known=KNOWN):
        return {verdict: words for verdict, words in views.named(text, known).items() if words}

    assert named("a dog , a cat and a dog .") == {"found": ["dog"], "invented": ["cat"]}
    assert named("no cat .") == {"rightly_denied": ["cat"]}
    assert named("there is no dog .") == {"wrongly_denied": ["dog"]}
    assert named("hello .") == {}
    assert views.named("a dog .", None) is None
    asked = Known(frozenset({"dog"}), "a detector", frozenset({"dog", "cup"}))
    assert named("a dog , a cat , a cup", asked) == {"found": ["dog"], "invented": ["cup"]}


def test_side_by_side_marks_what_differs_and_what_is_wrong():
    both = [("plain", "a dog and a cat .", "9 tokens"), ("VHR", "a dog and a hat .", "8 tokens")]
    screen = console()
    screen.print(views.side_by_side(both, KNOWN))
    shown = screen.file.getvalue()
    assert "\x1b[1;4;31mcat" in shown  # invented, and other than on the right
    assert "\x1b[1mhat" in shown
    assert "\x1b[32mdog" in shown
    screen = console()
    screen.print(views.side_by_side(both, None))
    assert "\x1b[1;33mcat" in screen.file.getvalue()
    assert "9 tokens" in screen.file.getvalue()


def test_a_transcript_names_pictures_and_methods():
    talk = Conversation().with_pictures(Picture("a.png", picture(), known=KNOWN))
    talk = talk.with_turn("what ?", "a cat", ["VHR(alpha=2.0)", "my_package.Mine(x=1)", "Old()"])
    talk = talk.with_pictures(Picture("b.png", picture()))
    screen = console(width=100)
    screen.print(views.transcript(talk))
    shown = screen.file.getvalue()
    assert "\x1b[1;4;31mcat" in shown
    plain = Text.from_ansi(shown).plain
    assert plain.splitlines() == [
        "(a.png)",
        "> what ?",
        "a cat   [VHR + my_package.Mine(x=1) + Old()]",
        "(next) b.png",
    ]


class TestBlockMap:
    def shown(self, values):
        screen = console(width=100)
        screen.print(views.block_map(np.asarray(values, np.float32), "a long title of a small map"))
        title, _, *rows, _ = Text.from_ansi(screen.file.getvalue()).plain.splitlines()
        assert title == "a long title of a small map"
        return [row.strip("│") for row in rows]

    def test_levels(self):
        # Five shades of a fifth of the peak each.
        rows = self.shown([[0, 0.19, 0.2, 0.4], [0.6, 0.8, 1.0, 0.39]])
        assert rows == ["    ░░▒▒", "▓▓████░░"]

    def test_nothing_at_all(self):
        assert self.shown([[0, 0], [0, 0]]) == ["    ", "    "]  # two characters a cell

    def test_large_maps_are_averaged(self):
        values = np.zeros((50, 70))
        values[:3, :3] = 1
        rows = self.shown(values)
        assert len(rows) == 17  # 70 columns need steps of 3
        assert rows[0].startswith("██  ")


def test_a_picture_in_half_blocks():
    image = Image.new("RGB", (4, 4), (255, 0, 0))
    image.paste((0, 0, 255), (0, 1, 4, 2))
    screen = console(color_system="truecolor")
    screen.print(views.drawn(image, 80))
    first, second = screen.file.getvalue().splitlines()
    assert first.count("▀") == second.count("▀") == 4
    assert "38;2;255;0;0;48;2;0;0;255m" in first
    assert "38;2;255;0;0;48;2;255;0;0m" in second


class TestLines:
    def read(self, text, monkeypatch):
        monkeypatch.setattr("sys.stdin", io.StringIO(text))
        entries, script = [], Script()
        while (entry := script.read()) is not None:
            entries.append(entry)
        return entries

    @pytest.mark.parametrize(
        ("text", "entries"),
        [
            ("one\n\n  \n two \n", ["one", "two"]),
            ("one\\\n two\\\nthree\nfour", ["one\n two\nthree", "four"]),
            ("one\\", ["one"]),
            ('"""one\n\n  two"""\nthree\n', ["one\n\n  two", "three"]),
            ('"""one"""\n', ["one"]),
            ('"""\na\n"""\n', ["a"]),
            ('a """ b\n', ['a """ b']),
            ("one\r\ntwo\r\n", ["one", "two"]),
            ("", []),
        ],
    )
    def test_entries(self, text, entries, monkeypatch):
        assert self.read(text, monkeypatch) == entries

    def test_a_block_without_end(self, monkeypatch):
        with pytest.raises(InputError, match="has no end"):
            self.read('"""one\ntwo', monkeypatch)


def test_where_the_history_is(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    assert history_file() == tmp_path / "mmlm" / "chat_history"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for value in ("", "relative"):
        monkeypatch.setenv("XDG_STATE_HOME", value)
        assert history_file() == tmp_path / "home/.local/state/mmlm/chat_history"


def test_paths_to_complete(tmp_path):
    (tmp_path / "a[1]").mkdir()
    (tmp_path / "a[1]" / "x.png").touch()
    (tmp_path / "b").touch()
    assert list(paths(f"{tmp_path}/a")) == [f"{tmp_path}/a[1]/"]
    assert list(paths(f"{tmp_path}/a[1]/")) == [f"{tmp_path}/a[1]/x.png"]
