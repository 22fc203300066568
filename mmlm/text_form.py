"""The one text form of a method: its Python call, e.g. ``VHR(alpha=2.0)``.

The same text stands on the command line, in YAML, in run records, reports and served model names,
and equals the ``repr`` of the object. Only literals are accepted; nothing is evaluated. Detectors
of the data pipelines are written in the same way (`parse_part`).
"""

from __future__ import annotations

import ast
import dataclasses
import difflib
import importlib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import mmlm
from mmlm.errors import InputError

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["method_names", "named_files", "parse_method", "parse_part"]


_EXAMPLES = {"method": "VHR(alpha=2.0)", "detector": "HFDetector(model='path')"}


def method_names(package: str = "") -> list[str]:
    """Names of the methods that ship with mmlm, sorted.

    Args:
        package: ``"decoding"`` for those that need nothing but a model as it is,
            ``"mmlm.methods"`` for the model-side ones; all by default.
    """
    prefix = f"{package}." if package else ""
    return sorted(name for name, module in mmlm._METHODS.items() if module.startswith(prefix))


def parse_method(text: str) -> Method:
    """Turns the text form of a method into the method.

    A bare name means the defaults (``VHR``). A dotted path names a class outside mmlm
    (``my_package.MyMethod(beta=1.0)``).

    Args:
        text: The Python call, keyword arguments only, literals only.

    Returns:
        The method; ``repr(parse_method(text))`` is its canonical text form.

    Raises:
        InputError: If the text is no such call, the name or a parameter is unknown, or the method
            refuses a value.
    """
    path, arguments = _split(text)
    return _build(text, path, _find_class(path), arguments, f"See: mmlm methods {path}")


def named_files(text: str) -> tuple[str, ...]:
    """Parameters of a method's text form by which it would read a file; nothing is read for it.

    Args:
        text: As for `parse_method`.

    Raises:
        InputError: If the text is no such call.
    """
    _, arguments = _split(text)

    def reads(name: str, value: Any) -> bool:
        if name.endswith(("_file", "_files")):
            return bool(value)
        return "heads" in name and isinstance(value, str)  # numbers, or the path of a map

    return tuple(name for name, value in arguments.items() if reads(name, value))


def parse_part(text: str, known: Mapping[str, str], kind: str) -> Any:
    """Turns the text form of a part that is no method, e.g. a detector, into the object.

    Args:
        text: The Python call, keyword arguments only, literals only. A bare name means the
            defaults; a dotted path names a class outside mmlm.
        known: Where the shipped classes are: name -> ``package.module:Class``.
        kind: What they are, for messages: "detector".

    Returns:
        The object.

    Raises:
        InputError: If the text is no such call, the name or a parameter is unknown, or the class
            refuses a value.
    """
    path, arguments = _split(text, kind)
    target = known.get(path)
    if target is None and "." not in path:
        raise InputError(
            f"There is no {kind} {path!r}; there are: {', '.join(known)}.",
            advice=_did_you_mean(path, list(known))
            or f"A {kind} of your own is named by its dotted path, my_package.MyClass.",
        )
    module, _, name = target.partition(":") if target else path.rpartition(".")
    cls = _import(module, name, kind, path)
    if not dataclasses.is_dataclass(cls):
        raise InputError(
            f"The {kind} {path!r} is no dataclass.", advice="Declare its parameters as fields."
        )
    return _build(text, path, cls, arguments, f"Its docstring explains them: help({path}).")


def _build(text: str, path: str, cls: Any, arguments: dict[str, Any], advice: str) -> Any:
    known = [field.name for field in dataclasses.fields(cls)]
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise InputError(
            f"{path} has no parameter {unknown[0]!r}; it has: {', '.join(known)}.",
            advice=_did_you_mean(unknown[0], known) or advice,
        )
    try:
        return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise InputError(
            f"{text.strip()!r} is refused: {error}",
            advice=f"Change that value. {advice}",
        ) from error


def _split(text: str, kind: str = "method") -> tuple[str, dict[str, Any]]:
    advice = f'Write a {kind} as a Python call, e.g. "{_EXAMPLES.get(kind, "Name(value=2.0)")}".'
    try:
        node = ast.parse(text.strip(), mode="eval").body
    except SyntaxError as error:
        raise InputError(f"{text!r} is not a {kind}: {error.msg}.", advice=advice) from error
    keywords: list[ast.keyword] = []
    if isinstance(node, ast.Call):
        if node.args or any(k.arg is None for k in node.keywords):
            raise InputError(
                f"{text!r} uses positional arguments; a {kind} takes named ones only.",
                advice=advice,
            )
        keywords, node = node.keywords, node.func
    if not isinstance(node, ast.Name | ast.Attribute):
        raise InputError(f"{text!r} is not a {kind}.", advice=advice)
    values = {}
    for keyword in keywords:
        try:
            values[str(keyword.arg)] = _literal(keyword.value)
        except ValueError as error:
            raise InputError(
                f"The value of {keyword.arg!r} in {text!r} is not a literal.",
                advice="Use numbers, strings, true/false, None, tuples, lists or dictionaries.",
            ) from error
    return ast.unparse(node), values


def _literal(node: ast.expr) -> Any:
    # repr() writes non-finite floats as bare names; the method's own check then explains them.
    if isinstance(node, ast.Name) and node.id in ("nan", "inf"):
        return float(node.id)
    return ast.literal_eval(node)


def _find_class(path: str) -> type[Method]:
    from mmlm.engine.method import Method

    if "." not in path:
        if path not in {**mmlm._METHODS, **mmlm._PROBES}:
            raise InputError(
                f"There is no method {path!r}; there are: {', '.join(method_names())}.",
                advice=_did_you_mean(path, method_names()) or "See: mmlm methods",
            )
        return getattr(mmlm, path)
    module_name, _, class_name = path.rpartition(".")
    found = _import(module_name, class_name, "method", path)
    if not (isinstance(found, type) and issubclass(found, Method)):
        raise InputError(
            f"{path!r} is not a subclass of mmlm.Method.",
            advice="See docs/writing-a-method.md.",
        )
    return found


def _import(module: str, name: str, kind: str, path: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise InputError(
            f"The {kind} {path!r} cannot be imported: {error}.",
            advice="Check the dotted path and that the package is installed.",
        ) from error


def _did_you_mean(given: str, known: list[str]) -> str:
    close = {k.lower(): k for k in known}
    match = difflib.get_close_matches(given.lower(), list(close), n=1)
    return f"Did you mean {close[match[0]]!r}?" if match else ""
