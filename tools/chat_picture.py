"""Draws what `mmlm chat` shows on a terminal: docs/images/chat.svg.

    python tools/chat_picture.py

A session of the embedded model is carried out for real; what it prints is recorded. The picture
names no font of the web: the reader's own monospaced one is used.
"""

from __future__ import annotations

import io
import re
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI
from rich.text import Text

import mmlm
from mmlm.cli.chat import Chat
from mmlm.cli.chat_files import opening
from mmlm.cli.chat_session import Session
from mmlm.cli.frame import Terminal
from mmlm.decoding_settings import GenerateSettings

WIDTH = 92
ENTRIES = (
    "describe the image in detail .",
    "/method VHR(alpha=3.0)",
    "/compare",
    "/inspect birds",
)
TARGET = Path(__file__).parents[1] / "docs" / "images" / "chat.svg"


@dataclass(frozen=True)
class Recorder(Terminal):
    """A terminal whose output, colours and all, is kept as text."""

    screen: Console = field(
        default_factory=lambda: Console(
            file=io.StringIO(),
            width=WIDTH,
            force_terminal=True,
            color_system="standard",
            highlight=False,
        )
    )

    def console(self) -> Console:  # noqa: D102
        return self.screen

    def say(self, text: str = "") -> None:  # noqa: D102
        self.screen.print(text, markup=False)

    def note(self, text: str) -> None:  # noqa: D102
        self.screen.print(text, markup=False, style="dim")


def main() -> None:
    """Carries out the session and writes the picture."""
    terminal = Recorder()
    settings = Chat(scene=7, generate=GenerateSettings(max_new_tokens=84))
    model, processor = mmlm.load("embedded")
    talk = opening(settings)
    session = Session(model, processor, (), settings, terminal, talk, patient=True)
    session.greet()
    for entry in ENTRIES:
        terminal.say(f"> {entry}")
        session.handle(entry)
    # Printed again as a whole: a terminal wraps what comes in pieces, rich does not.
    shown = Console(file=io.StringIO(), record=True, width=WIDTH, force_terminal=True)
    shown.print(Text.from_ansi(terminal.screen.file.getvalue()))
    drawn = shown.export_svg(title="mmlm chat --scene 7", theme=MONOKAI)
    drawn = re.sub(r"@font-face \{.*?\}", "", drawn, flags=re.S).replace("Fira Code, ", "")
    TARGET.write_text(drawn, encoding="utf-8")
    print(f"{TARGET}: {len(drawn) >> 10} KiB")


if __name__ == "__main__":
    main()
