"""What `mmlm chat` shows: answers as they come, two answers side by side, pictures, attention."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError
from mmlm.show.words import coloured, pieces, words

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image
    from rich.console import Console
    from rich.text import Text

    from mmlm.show.conversation import Conversation, Turn
    from mmlm.show.truth import Known

__all__ = ["Written", "block_map", "drawn", "named", "side_by_side", "transcript"]

HELD = 3
"""Words that are held back: what a word is called depends on those behind it ("hot dog")."""
SHADES = " ░▒▓█"
WIDEST = 32
"""Cells of a block map in a row at most; larger maps are averaged."""


def _marked(text: str, known: Known | None) -> Text:
    return coloured(text, None) if known is None else coloured(text, known.objects, known.asked)


class Written:
    """Writes an answer while it comes; objects are coloured as soon as their words are complete.

    Args:
        console: Where; without colours (a pipe, ``NO_COLOR``) the text is written without them.
        known: What is known about the pictures; None: nothing is coloured.
    """

    def __init__(self, console: Console, known: Known | None) -> None:
        self._console = console
        self._known = known
        self._text = ""
        self._done = 0

    def add(self, piece: str) -> None:
        """The answer goes on."""
        self._text += piece
        if self._known is None or not self._console.is_terminal:
            self._write(len(self._text))
        else:
            begun = words(self._text)[-HELD:]
            self._write(begun[0][0] if len(begun) == HELD else 0)

    def end(self, remark: str = "") -> None:
        """The answer has ended: writes what was held back, and a remark behind it."""
        self._write(len(self._text))
        self._console.print(remark, markup=False, highlight=False)

    def _write(self, end: int) -> None:
        if end <= self._done:
            return
        text = _marked(self._text, self._known)[self._done : end]
        self._console.print(text, end="", soft_wrap=True)
        self._console.file.flush()
        self._done = end


def named(text: str, known: Known | None) -> dict[str, list[str]] | None:
    """The words of an answer for objects, by what is to be said about them, each word once.

    Returns:
        The keys ``found``, ``invented``, ``rightly_denied`` and ``wrongly_denied``; None if nothing
        is known about the pictures.
    """
    if known is None:
        return None
    said = {
        ("good", False): "found",
        ("bad", False): "invented",
        ("good", True): "rightly_denied",
        ("bad", True): "wrongly_denied",
    }
    words: dict[str, list[str]] = {verdict: [] for verdict in said.values()}
    for piece in pieces(text, known.objects, known.asked):
        if piece.kind:
            verdict = words[said[piece.kind, piece.denied]]
            if piece.text not in verdict:
                verdict.append(piece.text)
    return words


def side_by_side(answers: Sequence[tuple[str, str, str]], known: Known | None) -> Any:
    """A table of two answers; words that the other one does not have there are bold.

    Args:
        answers: Two of: title, answer, remark below it.
        known: What is known about the pictures.
    """
    import difflib

    from rich.table import Table

    spans = [[match.span() for match in re.finditer(r"\S+", text)] for _, text, _ in answers]
    said = [
        [text[slice(*span)] for span in found]
        for (_, text, _), found in zip(answers, spans, strict=True)
    ]
    marked = [_marked(text, known) for _, text, _ in answers]
    style = "bold yellow" if known is None else "bold"
    for kind, *places in difflib.SequenceMatcher(
        None, said[0], said[1], autojunk=False
    ).get_opcodes():
        for shown, of, (start, end) in zip(marked, spans, (places[:2], places[2:]), strict=True):
            if kind != "equal" and start < end:
                shown.stylize(style, of[start][0], of[end - 1][1])
    table = Table(*(title for title, _, _ in answers), show_lines=True)
    table.add_row(*marked)
    table.add_row(*(remark for _, _, remark in answers))
    return table


def transcript(talk: Conversation) -> Any:
    """A conversation so far."""
    from rich.text import Text

    shown = Text()
    for number, turn in enumerate(talk.turns):
        shown.append(_picture_lines(turn))
        shown.append("> ", "dim")
        shown.append(f"{turn.question}\n", "bold")
        partial = type(talk)(talk.turns[: number + 1])
        shown.append(_marked(turn.answer, partial.known))
        by = " + ".join(map(_label, turn.methods))
        shown.append(f"   [{by}]\n" if by else "\n", "dim")
    for picture in talk.pending:
        shown.append(f"(next) {picture.name}\n", "dim")
    shown.rstrip()
    return shown


def _label(method: str) -> str:
    """A method's text form without its defaults; as it stands if it is none that mmlm ships."""
    import mmlm

    if method.partition("(")[0] not in mmlm.method_names():
        return method
    try:
        return mmlm.parse_method(method).label
    except InputError:  # written by another version
        return method


def _picture_lines(turn: Turn) -> Text:
    from rich.text import Text

    names = ", ".join(picture.name for picture in turn.pictures)
    return Text(f"({names})\n" if names else "", "dim")


def drawn(image: Image.Image, width: int) -> Any:
    """A picture in half blocks: every character is two pixels, one above the other.

    Args:
        image: RGB.
        width: Characters at most.
    """
    import numpy as np
    from PIL import Image as Pictures
    from rich.color import Color
    from rich.style import Style
    from rich.text import Text

    columns = min(width, image.width)
    rows = max(1, round(image.height * columns / image.width / 2))
    small = image.convert("RGB").resize((columns, 2 * rows), Pictures.Resampling.LANCZOS)
    pixels = np.asarray(small)
    shown = Text(no_wrap=True)
    for y in range(rows):
        shown.append("\n" if y else "")
        for x in range(columns):
            top, low = (Color.from_rgb(*pixels[2 * y + d, x]) for d in (0, 1))
            shown.append("▀", Style(color=top, bgcolor=low))
    return shown


def block_map(values: np.ndarray, title: str) -> Any:
    """Attention over a picture in blocks, in five shades, each a fifth of the peak.

    Args:
        values: [rows, columns], >= 0.
        title: Stands above it; in the frame it would make that wider than the picture.
    """
    import numpy as np
    from rich.console import Group
    from rich.panel import Panel
    from rich.text import Text

    step = -(-max(values.shape) // WIDEST)
    rows, columns = (-(-size // step) for size in values.shape)
    padded = np.zeros((rows * step, columns * step), np.float32)
    padded[: values.shape[0], : values.shape[1]] = values
    cells = padded.reshape(rows, step, columns, step).mean((1, 3))
    peak = float(cells.max())
    level = np.zeros_like(cells) if peak == 0 else cells / peak
    index = np.minimum((level * len(SHADES)).astype(int), len(SHADES) - 1)
    text = "\n".join("".join(SHADES[i] * 2 for i in row) for row in index)
    return Group(Text(title), Panel(text, expand=False, padding=0))
