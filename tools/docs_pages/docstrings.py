"""A Griffe extension: our docstrings as Markdown.

Fixed headings of methods (Idea, Paper, Differs ...) become paragraphs, examples become code, and
references such as ``:func:`divergence``` become links where the name is known.
"""

from __future__ import annotations

import functools
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import griffe

sys.path.insert(0, str(Path(__file__).parents[1]))

from docs_pages.source import public_modules

#: Sections that mkdocstrings lays out itself; it wants a blank line before each.
GOOGLE = {"Args", "Parameters", "Attributes", "Raises", "Returns", "Yields"}
CODE = {"Example", "Examples"}
HEADING = re.compile(r"^([A-Z][a-z]+(?: [a-z]+)?):$")
ROLE = re.compile(r":(?:\w+:)?\w+:`(~?)([\w.]+)`")


class Docstrings(griffe.Extension):
    """Rewrites the docstring of every object once it is loaded."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called by Griffe for modules, classes, functions and attributes."""
        if obj.docstring is not None:
            obj.docstring.value = rewritten(obj.docstring.value, obj)


def rewritten(text: str, obj: Any) -> str:
    """A docstring as Markdown."""
    lines: list[str] = []
    for title, body in _sections(text):
        if title is None:
            lines += [_linked(line, obj) for line in body]
        elif title in CODE:
            code = textwrap.dedent("\n".join(body)).strip("\n")
            lines += ["", "**Example.**", "", "```python", code, "```", ""]
        elif title in GOOGLE:
            lines += ["", f"{title}:", *(_linked(line, obj) for line in body), ""]
        else:
            words = [_linked(line.strip(), obj) for line in body if line.strip()]
            lines += ["", f"**{title}.** {words[0]}", *_items(words[1:]), ""]
    return "\n".join(_fenced(lines)).strip("\n")


def _sections(text: str) -> list[tuple[str | None, list[str]]]:
    """Headings with the indented lines below them; None for text without a heading."""
    found: list[tuple[str | None, list[str]]] = [(None, [])]
    lines = text.splitlines()
    for number, line in enumerate(lines):
        heading = HEADING.match(line)
        following = lines[number + 1] if number + 1 < len(lines) else ""
        if heading and following.startswith("    "):
            found.append((heading[1], []))
        elif found[-1][0] is not None and line and not line.startswith("    "):
            found.append((None, [line]))
        else:
            found[-1][1].append(line)
    return found


def _items(words: list[str]) -> list[str]:
    """Further lines of a section; one that starts with a number of an equation stands alone."""
    lines = []
    for line in words:
        if re.match(r"\(\d|Algorithm ", line):
            lines += [""]
        lines.append(line)
    return lines


def _linked(line: str, obj: Any) -> str:
    """References as links if the name can be found from here, as code otherwise."""

    def link(match: re.Match[str]) -> str:
        name = match[2]
        shown = name.rpartition(".")[2] if match[1] else name
        for scope in (obj, obj.module):
            try:
                path = scope.resolve(name)
            except griffe.NameResolutionError:
                continue
            if _has_a_place(path, scope):
                return f"[`{shown}`][{path}]"
        return f"`{shown}`"

    return ROLE.sub(link, line.replace("``", "`"))


@functools.cache
def _known() -> frozenset[str]:
    """What has a place on the API pages: modules and their public names."""
    found = public_modules()
    names = {f"{m.name}.{name}" for m in found for name in m.public if m.origin(name) == m.name}
    return frozenset(names | {module.name for module in found})


def _has_a_place(path: str, scope: Any) -> bool:
    """Whether a link may lead there: a public name, or a documented method of a public class."""
    if path in _known():
        return True
    above, _, name = path.rpartition(".")
    if above not in _known() or name.startswith("_") or not path.startswith(scope.module.path):
        return False
    member = scope.module[path.removeprefix(scope.module.path + ".")]
    return bool(member.is_function and member.docstring)


def _fenced(lines: list[str]) -> list[str]:
    """Lines without two blank ones after each other."""
    return [line for number, line in enumerate(lines) if line or not number or lines[number - 1]]
