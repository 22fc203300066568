"""``mmlm completion bash|zsh``: what the TAB key says in a shell.

The script that is printed is complete in itself: pressing TAB starts no Python. It is made from the
same dataclasses as the command line, by shtab, so it has every command, option, preset and method.
"""

from __future__ import annotations

import argparse
import importlib
import typing
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmlm.cli.frame import DONE, Command, HandOver, Terminal

__all__ = ["COMMAND", "Completion", "run", "script", "tree"]

FILES = {"bash": "_shtab_compgen_files", "zsh": "_files"}
CONFIGS = {"bash": "_mmlm_configs", "zsh": "_mmlm_configs"}
MODELS = {"bash": "_mmlm_models", "zsh": "_mmlm_models"}
PREAMBLE = {
    "bash": """
_mmlm_configs() {{
  compgen -W "{configs}" -- "$1"
  compgen -f -- "$1"
}}
_mmlm_models() {{
  compgen -W "embedded" -- "$1"
  compgen -d -- "$1"
}}
""",
    "zsh": """
_mmlm_configs() {{
  _alternative 'shipped:shipped configuration:({configs})' 'files:file:_files'
}}
_mmlm_models() {{
  _alternative 'shipped:shipped model:(embedded)' 'folders:folder:_files -/'
}}
""",
}


@dataclass(frozen=True)
class Completion:
    """Options of ``mmlm completion``.

    Attributes:
        shell: The shell.
    """

    shell: Literal["bash", "zsh"]


def run(settings: Completion, terminal: Terminal) -> int:
    """Prints the script; with ``--json`` as a value."""
    text = script(settings.shell)
    if terminal.json:
        terminal.emit({"shell": settings.shell, "script": text})
    terminal.say(text)
    return DONE


def script(shell: Literal["bash", "zsh"]) -> str:
    """The completion script of a shell."""
    import shtab

    from mmlm.cli.configs import shipped_configs

    filled = {
        name: text.format(configs=" ".join(shipped_configs())) for name, text in PREAMBLE.items()
    }
    text: str = shtab.complete(tree(), shell, preamble=filled)  # type: ignore[arg-type]
    return text


def tree() -> argparse.ArgumentParser:
    """The whole command line as one argparse parser: names, help, and what values may be."""
    from mmlm.cli import SUMMARIES

    parser = argparse.ArgumentParser("mmlm", allow_abbrev=False)
    parser.add_argument("--version", action="store_true", help="Show the version.")
    modules = {name: importlib.import_module(f"mmlm.cli.{name}") for name in SUMMARIES}
    found = {name: getattr(one, "COMMANDS", None) or one.COMMAND for name, one in modules.items()}
    _add(parser, found, SUMMARIES, "mmlm")
    return parser


def _add(
    parser: argparse.ArgumentParser,
    commands: Mapping[str, Any],
    summaries: Mapping[str, str],
    title: str,
) -> None:
    places = parser.add_subparsers()
    for name, command in commands.items():
        group = isinstance(command, Mapping)
        text = summaries.get(name) or (", ".join(command) if group else command.summary)
        # Colons separate names from texts in zsh's lists; argparse takes % for a format.
        text = text.replace("%", "%%")
        below = places.add_parser(name, help=text, allow_abbrev=False)
        if group:
            _add(below, command, {}, f"{title} {name}")
        elif isinstance(command, HandOver):
            _hand_over(below, command)
        else:
            _options(below, command, f"{title} {name}")


def _options(parser: argparse.ArgumentParser, command: Command, title: str) -> None:
    from mmlm.cli.arguments import COMMON, options

    for option in options(command):
        about: dict[str, Any] = {"help": option.help.replace("%", "%%")}
        if option.hint is bool:
            parser.add_argument(option.flag, action="store_true", **about)
            continue
        if values := _values(title, option.key, option.hint):
            about["choices"] = values
        if option.positional:
            action = parser.add_argument(
                option.key, nargs="*" if option.repeatable else "?", **about
            )
        else:
            action = parser.add_argument(option.flag, metavar=option.key.upper(), **about)
        if option.key in ("model.id", "model", "judge.model"):
            action.complete = MODELS  # type: ignore[attr-defined]  # read by shtab
        elif not values and _takes_files(option.key, option.hint):
            action.complete = FILES  # type: ignore[attr-defined]
    config = parser.add_argument("--config", metavar="CONFIG", help="A file or a shipped name.")
    config.complete = CONFIGS  # type: ignore[attr-defined]
    parser.add_argument("--print_config", action="store_true", help="Show the configuration.")
    for flag, text in COMMON.items():
        parser.add_argument(flag, action="store_true", help=text)


def _values(title: str, key: str, hint: Any) -> tuple[str, ...]:
    """The values that an option may have, if they can be told."""
    import mmlm

    last = key.rpartition(".")[2]
    if last == "methods" or (title, key) == ("mmlm methods", "name"):
        return (*mmlm.method_names(), "none") if last == "methods" else tuple(mmlm.method_names())
    if last == "split":
        from data_tools.world import SPLITS

        return tuple(SPLITS)
    if (title, key) == ("mmlm data fetch", "name"):
        from benchmarks.official import OFFICIAL

        return tuple(OFFICIAL)
    return tuple(map(str, _literals(hint)))


def _literals(hint: Any) -> Iterable[Any]:
    if typing.get_origin(hint) is Literal:
        return typing.get_args(hint)
    return [value for part in typing.get_args(hint) for value in _literals(part)]


def _takes_files(key: str, hint: Any) -> bool:
    return key == "images" or hint is Path or Path in typing.get_args(hint)


def _hand_over(parser: argparse.ArgumentParser, command: HandOver) -> None:
    """The options of another program of ours, from its own parser."""
    module, _, function = command.parser.partition(":")
    theirs: argparse.ArgumentParser = getattr(importlib.import_module(module), function)()
    for action in theirs._actions:
        flags = [flag for flag in action.option_strings if flag not in ("-h", "--help")]
        if not flags:
            continue
        # Whatever it does, to a shell it is a name that takes a value or not.
        takes: dict[str, Any] = {"metavar": "VALUE"}
        if action.nargs == 0:
            takes = {"action": "store_true"}
        copy = parser.add_argument(*flags, help=(action.help or "").replace("%", "%%"), **takes)
        if flags == ["--config"]:
            copy.complete = CONFIGS  # type: ignore[attr-defined]
        elif flags == ["--output"]:
            copy.complete = FILES  # type: ignore[attr-defined]


COMMAND = Command(
    summary="what TAB completes: a script for bash or zsh",
    settings=Completion,
    run=run,
    positional=("shell",),
    example=(
        "mmlm completion bash > ~/.local/share/bash-completion/completions/mmlm\n"
        "mmlm completion zsh > ~/.zfunc/_mmlm    # a folder of $fpath"
    ),
)
