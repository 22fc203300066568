"""``mmlm methods``: the methods, their parameters and costs, read from the classes themselves."""

from __future__ import annotations

import dataclasses
import inspect
import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, Command, Terminal, closest
from mmlm.errors import InputError

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["COMMAND", "Methods", "describe", "run"]


@dataclass(frozen=True)
class Methods:
    """Options of ``mmlm methods``.

    Attributes:
        name: Show everything about this method.
    """

    name: str | None = None


def run(settings: Methods, terminal: Terminal) -> int:
    """Lists the methods, or explains one.

    Raises:
        InputError: If there is no method of that name.
    """
    import mmlm

    names = mmlm.method_names()
    if settings.name is not None and settings.name not in names:
        raise InputError(
            f"There is no method {settings.name!r}.",
            advice=closest(settings.name, names) or f"There are: {', '.join(names)}.",
        )
    shown = [settings.name] if settings.name else names
    described = [describe(getattr(mmlm, name)) for name in shown]
    if terminal.json:
        terminal.emit(described)
    elif settings.name:
        terminal.say(inspect.cleandoc(getattr(mmlm, settings.name).__doc__ or ""))
    else:
        terminal.table(_table(described))
        terminal.say('One of them in full: mmlm methods VHR.   Use: --method "VHR(alpha=2.0)"')
    return DONE


def describe(cls: type[Method]) -> dict[str, Any]:
    """What a method's class says about itself, as JSON values.

    Args:
        cls: A subclass of :class:`mmlm.Method`.

    Returns:
        Name, summary, paper, sites, cost, and the parameters with default and meaning.
    """
    sections = _sections(cls)
    meanings = _entries(sections.get("Parameters", ""))
    return {
        "name": cls.__name__,
        "summary": inspect.cleandoc(cls.__doc__ or "").partition("\n")[0],
        "paper": dataclasses.asdict(cls.paper),
        "sites": sorted(cls().sites),
        "cost": " ".join(sections.get("Cost", "").split()),
        "parameters": [
            {
                "name": field.name,
                "default": field.default,
                "meaning": meanings.get(field.name, ""),
            }
            for field in dataclasses.fields(cls)
        ],
    }


def _sections(cls: type) -> dict[str, str]:
    """The headed sections of a class docstring."""
    parts = re.split(r"^([A-Z][A-Za-z ]+):$", inspect.cleandoc(cls.__doc__ or ""), flags=re.M)
    return dict(zip(parts[1::2], map(inspect.cleandoc, parts[2::2]), strict=True))


def _entries(section: str) -> dict[str, str]:
    """``name: text`` entries; deeper indented lines continue the entry before."""
    found: dict[str, str] = {}
    name = ""
    for line in section.splitlines():
        if match := re.match(r"(\w+): (.*)", line):
            name, found[match[1]] = match[1], match[2]
        elif name:
            found[name] += f" {line.strip()}"
    return found


def _table(described: list[dict[str, Any]]) -> Any:
    from rich.table import Table

    table = Table("method", "what it does", "acts at", "parameters (default)", "cost", "paper")
    for one in described:
        paper = one["paper"]
        parameters = "\n".join(f"{p['name']} ({p['default']!r})" for p in one["parameters"])
        table.add_row(
            f"[bold]{one['name']}[/bold]",
            one["summary"],
            ", ".join(one["sites"]),
            parameters,
            one["cost"].partition(".")[0],
            f"{paper['venue']}\narXiv {paper['arxiv']}",
        )
    return table


COMMAND = Command(
    summary="list the methods with their parameters",
    settings=Methods,
    run=run,
    positional=("name",),
    example="mmlm methods\nmmlm methods VHR\nmmlm methods --json",
)
