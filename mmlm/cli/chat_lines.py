"""What a user types in `mmlm chat`: lines, blocks of lines, the history of earlier sessions."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from mmlm.errors import InputError

__all__ = ["Editor", "Script", "history_file"]

QUOTES = '"""'
KEPT = 1000
"""Lines of history that are kept."""


def history_file() -> Path:
    """Where typed lines are kept: the state folder of the XDG base directories."""
    state = os.environ.get("XDG_STATE_HOME", "")
    # The specification: a relative path is to be ignored.
    base = Path(state) if state.startswith("/") else Path.home() / ".local" / "state"
    return base / "mmlm" / "chat_history"


class Script:
    """Entries from standard input that is a file or a pipe."""

    def read(self) -> str | None:
        """The next entry that is not blank; None at the end.

        A line that ends in a backslash goes on in the next; what stands between two marks of three
        double quotes is one entry, line breaks and all.

        Raises:
            InputError: If a block has no end.
        """
        while (line := self._line("")) is not None:
            if entry := self._whole(line.rstrip("\r\n")).strip():
                return entry
        return None

    def _whole(self, line: str) -> str:
        if line.lstrip().startswith(QUOTES):
            return self._block(line.lstrip().removeprefix(QUOTES))
        lines = [line]
        while lines[-1].endswith("\\"):
            lines[-1] = lines[-1].removesuffix("\\")
            if (more := self._line("... ")) is None:
                break
            lines.append(more.rstrip("\r\n"))
        return "\n".join(lines)

    def _block(self, line: str) -> str:
        lines = []
        while QUOTES not in line:
            lines.append(line)
            if (more := self._line("... ")) is None:
                raise InputError(
                    f"The text after {QUOTES} has no end.", advice=f"End it with {QUOTES}."
                )
            line = more.rstrip("\r\n")
        last, _, rest = line.partition(QUOTES)
        return "\n".join([*lines, last + rest])

    def _line(self, prompt: str) -> str | None:
        """One line; None at the end of the input."""
        return sys.stdin.readline() or None


class Editor(Script):
    """Entries from a terminal: editing, completion with TAB, and a history that lasts.

    Args:
        history: The file of the history; None keeps none.
        complete: Gives the words that may stand where the cursor is: called with the line before
            the cursor and the word that is begun.
        prompt: Shown before an entry; "" while a program reads standard output.
        tell: Called with a remark for the user.
    """

    def __init__(
        self,
        history: Path | None,
        complete: Callable[[str, str], Sequence[str]],
        prompt: str,
        tell: Callable[[str], None],
    ) -> None:
        import readline

        self._readline = readline
        self._history = history
        self._prompt = prompt
        self._tell = tell
        self._complete = complete
        readline.set_completer(self._candidate)
        readline.set_completer_delims(" \t\n")
        libedit = "libedit" in (readline.__doc__ or "")
        readline.parse_and_bind("bind ^I rl_complete" if libedit else "tab: complete")
        readline.set_history_length(KEPT)
        self._open_history()

    def read(self) -> str | None:
        """See :meth:`Script.read`; Ctrl-C drops what was typed, Ctrl-D ends."""
        while True:
            try:
                entry = super().read()
            except KeyboardInterrupt:
                print()
                self._tell("(/quit leaves)")
            else:
                self._keep()
                return entry

    def _line(self, prompt: str) -> str | None:
        # The continuation mark is shown where the prompt is.
        shown = (prompt or self._prompt) if self._prompt else ""
        try:
            return input(shown)
        except EOFError:
            print()
            return None

    def _open_history(self) -> None:
        self._kept = 0
        if self._history is None:
            return
        try:
            self._history.parent.mkdir(parents=True, exist_ok=True)
            # Questions may be private.
            os.close(os.open(self._history, os.O_CREAT | os.O_RDWR, 0o600))
            self._readline.clear_history()
            self._readline.read_history_file(self._history)
        except OSError as error:
            self._tell(f"note: no history is kept: {self._history}: {error.strerror or error}")
            self._history = None
        self._kept = self._readline.get_current_history_length()

    def _keep(self) -> None:
        """Adds the new lines at once: two sessions may run, and either may be killed."""
        length = self._readline.get_current_history_length()
        if self._history is not None and length > self._kept:
            with contextlib.suppress(OSError):  # e.g. a full disk: no reason to end a conversation
                self._readline.append_history_file(length - self._kept, self._history)
        self._kept = length

    def _candidate(self, text: str, state: int) -> str | None:
        before = self._readline.get_line_buffer()[: self._readline.get_begidx()]
        found = self._complete(before, text)
        if len(found) == 1 and not found[0].endswith("/"):
            found = [f"{found[0]} "]  # done with this word; Python turns readline's own blank off
        return found[state] if state < len(found) else None


def paths(text: str) -> Iterator[str]:
    """Files and folders that begin like this, folders with a slash at the end."""
    for path in sorted(glob.glob(glob.escape(os.path.expanduser(text)) + "*")):
        yield f"{path}/" if os.path.isdir(path) else path
