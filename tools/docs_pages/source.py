"""What the source says without being imported: modules, public names, where a name comes from."""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
PACKAGES = ("mmlm", "decoding", "training", "data_tools", "benchmarks")


@dataclass(frozen=True)
class Module:
    """One source file."""

    name: str
    path: Path
    tree: ast.Module

    @property
    def public(self) -> tuple[str, ...]:
        """The names in ``__all__``, in the order in which they are written; empty without it."""
        for statement in self.tree.body:
            targets = statement.targets if isinstance(statement, ast.Assign) else []
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
                return tuple(ast.literal_eval(statement.value))
        return ()

    @property
    def summary(self) -> str:
        """The first line of the module's text."""
        return (ast.get_docstring(self.tree) or "").partition("\n")[0]

    @property
    def set_together(self) -> dict[str, str]:
        """Names that one statement sets several of, ``A, B = 0, 1``, with that statement."""
        return {
            element.id: ast.unparse(statement)
            for statement in self.tree.body
            if isinstance(statement, ast.Assign) and isinstance(statement.targets[0], ast.Tuple)
            for element in statement.targets[0].elts
            if isinstance(element, ast.Name)
        }

    def origin(self, name: str) -> str:
        """The module that defines a public name: this one, or the one it is imported from."""
        for node in ast.walk(self.tree):
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                if any((alias.asname or alias.name) == name for alias in node.names):
                    return node.module
        return self.name


def modules() -> Iterator[Module]:
    """Every module of the five packages, sorted by name; those with an underscore are private."""
    found = {}
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            parts = path.relative_to(ROOT).with_suffix("").parts
            parts = parts[:-1] if parts[-1] == "__init__" else parts
            importable = (path.parent / "__init__.py").exists()
            if importable and not any(part.startswith("_") for part in parts):
                found[".".join(parts)] = path
    for name in sorted(found):
        yield Module(name, found[name], ast.parse(found[name].read_text(encoding="utf-8")))


@functools.cache
def public_modules() -> list[Module]:
    """Those with an ``__all__`` that names something."""
    return [module for module in modules() if module.public]
