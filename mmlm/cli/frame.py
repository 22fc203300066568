"""What every command shares: dispatch, exit codes, error texts, output for people or programs."""

from __future__ import annotations

import difflib
import importlib
import json
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, MmlmError

if TYPE_CHECKING:
    from rich.console import Console

__all__ = [
    "BUG",
    "DONE",
    "MISUSE",
    "SOME_FAILED",
    "STOPPED",
    "Command",
    "HandOver",
    "Terminal",
    "closest",
    "explain_bugs",
    "run_guarded",
]

DONE = 0
BUG = 1
MISUSE = 2
SOME_FAILED = 3
STOPPED = 130


@dataclass(frozen=True)
class Command:
    """One command: what it is, which options it takes, what it does.

    Args:
        summary: One line for the help.
        settings: The dataclass that declares the options.
        run: Called with an instance of ``settings`` and a :class:`Terminal`; returns an exit code.
        positional: Fields of ``settings`` that are given without a flag, in this order.
        example: One or more command lines, shown at the end of the help.
    """

    summary: str
    settings: type
    run: Callable[[Any, Terminal], int]
    positional: tuple[str, ...] = ()
    example: str = ""


@dataclass(frozen=True)
class HandOver:
    """A command whose arguments another program of ours parses (``mmlm train``).

    Args:
        summary: One line for the help.
        target: ``"package.module:function"``, called with the list of arguments.
        parser: ``"package.module:function"``, gives that program's parser; for completions.
    """

    summary: str
    target: str
    parser: str


@dataclass(frozen=True)
class Terminal:
    """Where a command writes: answers to standard output, everything else to standard error.

    Args:
        json: A program reads the answer: standard output carries JSON only.
        quiet: No progress, no remarks; errors are still shown.
        debug: Show tracebacks.
    """

    json: bool = False
    quiet: bool = False
    debug: bool = False

    def emit(self, value: Any) -> None:
        """Writes one JSON value as a line on standard output."""
        print(json.dumps(value, ensure_ascii=False, allow_nan=False), flush=True)

    def say(self, text: str = "") -> None:
        """Writes a line for people on standard output; nothing in JSON mode."""
        if not self.json:
            print(text, flush=True)

    def note(self, text: str) -> None:
        """Writes a remark on standard error, unless quiet."""
        if not self.quiet:
            print(text, file=sys.stderr, flush=True)

    def error(self, message: str, advice: str) -> None:
        """Writes an error and its line of advice on standard error."""
        print(f"error: {message}\nadvice: {advice}", file=sys.stderr, flush=True)

    def table(self, table: Any) -> None:
        """Prints a rich table (or any rich renderable) on standard output; not in JSON mode."""
        if not self.json:
            self.console().print(table)

    def console(self) -> Console:
        """A rich console on standard output.

        It is wide when the output is a file or a pipe: cut table cells would be lost there.
        """
        from rich.console import Console

        width = None if sys.stdout.isatty() else 160
        return Console(file=sys.stdout, width=width, highlight=False)

    @property
    def progress(self) -> bool:
        """Whether a progress bar should be drawn: standard error is a terminal, and not quiet."""
        return not self.quiet and sys.stderr.isatty()


def run_guarded(arguments: Sequence[str], summaries: Mapping[str, str]) -> int:
    """Runs the command named by the first argument; turns errors into text and an exit code."""
    debug = "--debug" in arguments
    try:
        return _run(arguments, summaries)
    except MmlmError as error:
        _explain(str(error), error.advice, debug)
        return MISUSE
    except BrokenPipeError:
        # The reader (`| head`) went away. Point stdout elsewhere, or the interpreter complains
        # once more when it flushes at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return DONE
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        _explain(
            f"{where}{error.strerror or error}",
            "Check that the path exists, that you may use it, and that the disk is not full.",
            debug,
        )
        return MISUSE
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return STOPPED


def _run(arguments: Sequence[str], summaries: Mapping[str, str]) -> int:
    name, *rest = arguments
    command = _find(name, summaries)
    title = f"mmlm {name}"
    while isinstance(command, Mapping):
        if not rest or rest[0] in ("-h", "--help"):
            print(_group_help(title, command), file=sys.stdout if rest else sys.stderr)
            return DONE if rest else MISUSE
        sub, *rest = rest
        if sub not in command:
            raise _unknown(f"{title} {sub}", sub, command, f"{title} --help")
        command, title = command[sub], f"{title} {sub}"
    if isinstance(command, HandOver):
        from mmlm.cli.configs import with_config_paths

        module, _, function = command.target.partition(":")
        return getattr(importlib.import_module(module), function)(with_config_paths(rest))
    # Importing jsonargparse takes 0.1 s: only now.
    from mmlm.cli.arguments import parse

    parsed = parse(title, command, rest)
    return DONE if parsed is None else command.run(*parsed)


def _find(name: str, summaries: Mapping[str, str]) -> Any:
    if name not in summaries:
        raise _unknown(f"mmlm {name}", name, summaries, "mmlm --help")
    module = importlib.import_module(f"mmlm.cli.{name}")
    return module.COMMANDS if hasattr(module, "COMMANDS") else module.COMMAND


def _unknown(given: str, name: str, known: Iterable[str], help_command: str) -> InputError:
    return InputError(
        f"There is no command `{given}`; there are: {', '.join(known)}.",
        advice=closest(name, known) or f"See: {help_command}",
    )


def closest(given: str, known: Iterable[str]) -> str:
    """``Did you mean 'x'?`` if one of the known names is close to what was given, else ``""``."""
    match = difflib.get_close_matches(given, list(known), n=1)
    return f"Did you mean {match[0]!r}?" if match else ""


def _group_help(title: str, commands: Mapping[str, Any]) -> str:
    width = max(map(len, commands))
    lines = "\n".join(f"  {name:<{width}}  {_line_of(c)}" for name, c in commands.items())
    return f"usage: {title} COMMAND [options]\n\ncommands:\n{lines}\n\nSee: {title} COMMAND --help"


def _line_of(command: Any) -> str:
    """One line about a command, or about a group by naming what is in it."""
    return ", ".join(command) if isinstance(command, Mapping) else command.summary


def _explain(message: str, advice: str, debug: bool) -> None:
    if debug:
        traceback.print_exc()
    Terminal().error(message, advice or "Run again with --debug to see where it happened.")


def explain_bugs(*, debug: bool) -> None:
    """Makes the interpreter report an unexpected exception in two lines (exit code 1).

    Only the console script calls this: whoever calls :func:`mmlm.cli.main` gets the exception.
    """

    def hook(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        if debug:
            traceback.print_exception(kind, error, trace)
        print(f"internal error: {kind.__name__}: {error}", file=sys.stderr)
        print(
            "advice: This is a bug in mmlm or a library; run again with --debug and report it.",
            file=sys.stderr,
        )

    sys.excepthook = hook
