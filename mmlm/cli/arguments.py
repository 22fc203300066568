"""From a dataclass to a command line, through jsonargparse: strict keys, YAML, help, overrides.

The fields are added one by one, not with ``add_class_arguments``: that would also offer every
group as an option of its own (``--model CONFIG``), the very name under which users give a model.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import docstring_parser
import jsonargparse

from mmlm.cli.configs import find_config
from mmlm.cli.frame import Command, Terminal, closest
from mmlm.errors import InputError

__all__ = ["COMMON", "Option", "choices", "options", "parse"]


COMMON = {
    "--json": "Write the answer as JSON.",
    "--quiet": "No progress bar, no remarks.",
    "--debug": "Show tracebacks.",
}
"""The switches of every command."""


@dataclass(frozen=True)
class Option:
    """One option of a command, read from a field of its dataclass.

    Attributes:
        key: Its place in the configuration, ``model.id``.
        hint: The type of the field.
        default: Its default; ``dataclasses.MISSING`` if it must be given.
        help: What the docstring says.
        alias: The name that users give it, if it is not the key.
        positional: Whether it is given without a name.
    """

    key: str
    hint: Any
    default: Any
    help: str
    alias: str | None
    positional: bool = False

    @property
    def required(self) -> bool:
        """Whether it must be given."""
        return self.default is dataclasses.MISSING

    @property
    def repeatable(self) -> bool:
        """Whether it may be given several times."""
        return typing.get_origin(self.hint) is tuple

    @property
    def flag(self) -> str:
        """What users write."""
        return self.key.upper() if self.positional else self.alias or f"--{self.key}"


def parse(title: str, command: Command, argv: Sequence[str]) -> tuple[Any, Terminal] | None:
    """Parses the arguments of a command.

    Args:
        title: ``mmlm generate``, for the help.
        command: The command.
        argv: Arguments after the command's name.

    Returns:
        The settings and the terminal, or None if only help or the configuration was printed.

    Raises:
        InputError: For unknown options or keys, wrong types and refused values.
    """
    known = options(command)
    parser = _parser(title, command, known)
    try:
        namespace = parser.parse_args(_plain(argv, known))
    except argparse.ArgumentError as error:
        raise _input_error(str(error), title, known) from error
    except SystemExit:  # jsonargparse leaves this way after --help and --print_config
        return None
    terminal = Terminal(json=namespace.json, quiet=namespace.quiet, debug=namespace.debug)
    try:
        return _build(command.settings, namespace), terminal
    except ValueError as error:
        raise InputError(f"{title}: {error}", advice=f"Allowed values: {title} --help") from error


def options(command: Command) -> list[Option]:
    """The options of a command, in the order of its fields."""
    return [
        dataclasses.replace(option, positional=option.key in command.positional)
        for option in _options(command.settings)
    ]


def _options(cls: Any, prefix: str = "") -> Iterator[Option]:
    hints = typing.get_type_hints(cls)
    docs = {  # of the class and what it inherits; a class of its own describes a field anew
        p.arg_name: p.description
        for part in reversed(cls.__mro__)
        if dataclasses.is_dataclass(part)
        for p in docstring_parser.parse(part.__doc__ or "").params
    }
    for field in dataclasses.fields(cls):
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            yield from _options(hint, f"{prefix}{field.name}.")
            continue
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        yield Option(
            key=prefix + field.name,
            hint=hint,
            default=default,
            help=" ".join((docs.get(field.name) or "").split()),
            alias=field.metadata.get("alias"),
        )


def _parser(title: str, command: Command, options: list[Option]) -> jsonargparse.ArgumentParser:
    words = [_word(option) for option in options if option.positional]
    parser = jsonargparse.ArgumentParser(
        prog=title,
        usage=" ".join([title, *words, "[options]"]),
        description=f"{command.summary[:1].upper()}{command.summary[1:]}.",
        epilog=f"examples:\n{textwrap.indent(command.example, '  ')}" if command.example else None,
        formatter_class=_formatter({f"--{o.key}": o for o in options}),
        exit_on_error=False,
        allow_abbrev=False,
        default_env=False,
    )
    groups: dict[str, Any] = {}
    for option in options:
        group, _, name = option.key.rpartition(".")
        target: Any = parser
        if group:
            target = groups.setdefault(group, None) or parser.add_argument_group(group)
            groups[group] = target
        arguments: dict[str, Any] = {"type": option.hint, "help": _help(option)}
        if option.positional:
            if option.repeatable:
                # One value each: jsonargparse would read every word as a whole list.
                arguments |= {
                    "type": typing.get_args(option.hint)[0],
                    "nargs": "+" if option.required else "*",
                }
            elif not option.required:
                arguments |= {"nargs": "?", "default": option.default}
            target.add_argument(option.key, **arguments)
            continue
        arguments |= {"required": True} if option.required else {"default": option.default}
        if option.hint is not bool and not choices(option.hint):
            arguments["metavar"] = name.rstrip("s").upper() if option.repeatable else name.upper()
        target.add_argument(f"--{option.key}", **arguments)
    _add_common(parser)
    return parser


def _word(option: Option) -> str:
    word = option.flag + (" ..." if option.repeatable else "")
    return word if option.required else f"[{word}]"


def _add_common(parser: jsonargparse.ArgumentParser) -> None:
    # Not in the group: jsonargparse adds --print_config only beside a --config of the parser.
    parser.add_argument(
        "--config", action="config", help="A YAML file, or the name of a shipped one (decode/vhr)."
    )
    group = parser.add_argument_group("common to all commands")
    for flag, text in COMMON.items():
        group.add_argument(flag, action="store_true", help=text)


def _help(option: Option) -> str:
    if option.required:
        return option.help if option.positional else f"{option.help} (required)"
    shown = str(option.default).lower() if option.hint is bool else option.default
    return option.help if option.default in (None, ()) else f"{option.help} (default: {shown})"


def _formatter(options: dict[str, Option]) -> type[argparse.HelpFormatter]:
    class Formatter(jsonargparse.DefaultHelpFormatter):
        """Shows the short alias of an option, and keeps the line breaks of the examples."""

        def _format_action_invocation(self, action: argparse.Action) -> str:
            option = options.get(action.option_strings[0]) if action.option_strings else None
            if option is None or option.alias is None:
                return super()._format_action_invocation(action)
            if option.hint is bool:
                return option.alias
            repeat = " (repeatable)" if option.repeatable else ""
            return f"{option.alias} {action.metavar}{repeat}"

        def _get_help_string(self, action: argparse.Action) -> str:
            return action.help or ""  # jsonargparse would add Python's type names

        def _fill_text(self, text: str, width: int, indent: str) -> str:
            return "\n".join(indent + line for line in text.splitlines())

    return Formatter


def _plain(argv: Sequence[str], options: list[Option]) -> list[str]:
    """Rewrites aliases, repeated options, bare switches and names of shipped configurations.

    ``--config`` comes first, so that other options win over the file wherever it was named.
    ``--model M`` becomes ``--model.id=M``; all ``--method A --method B`` become one list, which
    replaces a list from a configuration file; ``--strict`` becomes ``--strict=true``.
    """
    named = [option for option in options if not option.positional]
    by_flag = {option.flag: option for option in named}
    by_flag |= {f"--{o.key}": o for o in named if o.repeatable}
    switches = {flag: o for o in options if o.hint is bool for flag in (o.flag, f"--{o.key}")}
    files: list[str] = []
    rewritten: list[str] = []
    collected: dict[str, list[str]] = {}
    rest = list(argv)
    while rest:
        token = rest.pop(0)
        if token == "--":
            rewritten += [token, *rest]
            break
        name, equals, value = token.partition("=")
        option = by_flag.get(name)
        if name in switches and not equals:
            given = rest.pop(0) if rest and rest[0] in ("true", "false") else "true"
            rewritten.append(f"--{switches[name].key}={given}")
        elif name == "--config" or (option and (option.alias or option.repeatable)):
            if not equals and not rest:
                raise InputError(f"{name} needs a value.", advice=f"Write: {name} VALUE")
            value = value if equals else rest.pop(0)
            if option is None:
                files.append(f"--config={find_config(value)}")
            elif option.repeatable and name == f"--{option.key}" and value.startswith("["):
                rewritten.append(f"{name}={value}")  # a whole list
            elif option.repeatable:
                collected.setdefault(option.key, []).append(value)
            else:
                rewritten.append(f"--{option.key}={value}")
        else:
            rewritten.append(token)
    lists = [f"--{key}={json.dumps(values)}" for key, values in collected.items()]
    return files + lists + rewritten


def _build(cls: Any, namespace: Any) -> Any:
    hints = typing.get_type_hints(cls)
    values = {}
    for field in dataclasses.fields(cls):
        value = getattr(namespace, field.name)
        hint = hints[field.name]
        if dataclasses.is_dataclass(hint):
            value = _build(hint, value)
        elif typing.get_origin(hint) is tuple and isinstance(value, list):
            value = tuple(value)  # positional words come as a list
        values[field.name] = value
    return cls(**values)


def _input_error(text: str, title: str, options: list[Option]) -> InputError:
    """Says in one sentence what jsonargparse says in several lines."""
    by_key = {option.key: option for option in options}
    if match := re.search(r'Parser key "([^"]+)":', text):
        option = by_key.get(match[1])
        given = re.search(r"(?:Got|Given) value: (.*)", text)
        if option and given:
            return InputError(
                f"{option.flag} does not take {given[1]!r}: expected {_describe(option.hint)}.",
                advice=f"See: {title} --help",
            )
    if match := re.search(r"Option '([^']+)' is not accepted", text):
        return InputError(
            f"There is no setting {match[1]!r} in `{title}`.",
            advice=closest(match[1], by_key) or f"Known settings: {', '.join(by_key)}",
        )
    if match := re.search(r"unrecognized arguments: (\S+)", text):
        known = [flag for o in options if not o.positional for flag in (o.flag, f"--{o.key}")]
        return InputError(
            f"`{title}` does not know {match[1]!r}.",
            advice=closest(match[1].partition("=")[0], known) or f"See: {title} --help",
        )
    if match := re.search(r"(?:arguments are required: |Key \"?)([\w., ]+)", text):
        missing = [by_key[k].flag if k in by_key else k for k in match[1].split(", ")]
        return InputError(f"`{title}` needs {', '.join(missing)}.", advice=f"See: {title} --help")
    return InputError(" ".join(text.split()), advice=f"See: {title} --help")


def choices(hint: Any) -> tuple[Any, ...]:
    """The values of a ``Literal``; none for other types."""
    return typing.get_args(hint) if typing.get_origin(hint) is typing.Literal else ()


def _describe(hint: Any) -> str:
    if values := choices(hint):
        return f"one of {', '.join(map(str, values))}"
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " or ".join(_describe(part) for part in typing.get_args(hint))
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "text"}
    if hint is type(None):
        return "nothing (null)"
    return names.get(hint, str(hint))
