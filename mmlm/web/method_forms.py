"""Forms made from the methods' own fields: type, default and docstring; the class checks values.

A column of a comparison is one line of text, the methods' Python calls joined by " + ". The form is
another view of that text: each change of a field builds the method again, which refuses what is out
of range, and writes the text anew.
"""

from __future__ import annotations

import ast
import dataclasses
import sys
import typing
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = [
    "Parameter",
    "load_methods",
    "method_name",
    "method_names",
    "parameters",
    "read_methods",
    "start_text",
    "with_value",
    "write_methods",
]

JOIN = " + "


@dataclass(frozen=True)
class Parameter:
    """One field of a method, as a form shows it.

    Attributes:
        name: Of the field.
        kind: "bool", "choice", "int", "float", "str", or "literal" for everything else, which is
            written as Python: None, tuples, dictionaries.
        value: In force.
        default: Of the class.
        meaning: From the docstring.
        choices: What a "choice" allows.
    """

    name: str
    kind: Literal["bool", "choice", "int", "float", "str", "literal"]
    value: Any
    default: Any
    meaning: str
    choices: tuple[Any, ...] = ()

    @property
    def shown(self) -> Any:
        """The value as a form's component takes it."""
        return repr(self.value) if self.kind == "literal" else self.value


def read_methods(text: str | None) -> tuple[Method, ...]:
    """The methods of one column.

    Args:
        text: Calls joined by " + "; empty or ``none`` for the plain model. A method of one's own
            is named by its path, if its module is loaded already (`load_methods`).

    Raises:
        InputError: For an unknown method or parameter, a refused value, or a probe.
    """
    import mmlm

    methods = []
    for part in _split(text or ""):
        module = part.partition("(")[0].rpartition(".")[0]
        if module and module not in sys.modules:
            # Nothing is imported at the request of a visitor.
            raise InputError(
                f"{part!r} names a class by its path, and {module!r} is not loaded here.",
                advice=f'Start the playground with it: mmlm web --method "{part}"',
            )
        method = mmlm.parse_method(part)
        if type(method).__name__ in mmlm._PROBES:
            raise InputError(
                f"{method.label} is a probe: it measures and changes no answer.",
                advice="Click a word of an answer to see where the model looked.",
            )
        methods.append(method)
    return tuple(methods)


def load_methods(text: str) -> tuple[Method, ...]:
    """Like `read_methods`, for the one who starts the playground: modules are imported.

    Args:
        text: Calls joined by " + ".

    Raises:
        InputError: As `read_methods` does, or if a module cannot be imported.
    """
    import mmlm

    for part in _split(text):
        mmlm.parse_method(part)
    return read_methods(text)


def write_methods(methods: typing.Sequence[Method]) -> str:
    """The text form of a column: parameters that have their default value are left out."""
    return JOIN.join(
        method.label
        if method_name(method) == type(method).__name__
        else f"{type(method).__module__}.{method.label}"
        for method in methods
    )


def method_name(method: Method) -> str:
    """What a method is chosen by: its name, or its path if it does not ship with mmlm."""
    import mmlm

    cls = type(method)
    return cls.__name__ if cls.__name__ in mmlm._METHODS else f"{cls.__module__}.{cls.__name__}"


def method_names(text: str) -> tuple[str, ...]:
    """What the methods of a column are chosen by, read from the text alone: nothing is imported.

    Args:
        text: Calls joined by " + ".
    """
    return tuple(part.partition("(")[0].strip() for part in _split(text))


def start_text(name: str, model: str) -> str:
    """What a column starts with when a method is chosen by name.

    Args:
        name: Of a method, see `method_name`.
        model: The model it will run on: for the embedded one the recommended setting is known.
    """
    from mmlm.cli.configs import effect_settings
    from mmlm.cli.options import EMBEDDED

    if model == EMBEDDED:
        known = {**effect_settings("pruning"), **effect_settings(EMBEDDED)}
        if name in known:
            return known[name][0]
    return write_methods(read_methods(name))


def parameters(method: Method) -> tuple[Parameter, ...]:
    """The fields of a method, in order."""
    from mmlm.cli.methods import describe

    hints = typing.get_type_hints(type(method))
    described = describe(type(method))["parameters"]
    # Docstrings mark code as Sphinx does, pages as Markdown does.
    meanings = {one["name"]: one["meaning"].replace("``", "`") for one in described}
    found = []
    for field in dataclasses.fields(method):
        kind, choices = _kind(hints[field.name])
        value = getattr(method, field.name)
        found.append(
            Parameter(field.name, kind, value, field.default, meanings[field.name], choices)
        )
    return tuple(found)


def with_value(text: str, index: int, name: str, shown: Any) -> str:
    """The text of a column after one field of its form was changed.

    Args:
        text: Before.
        index: Which of the methods in the text.
        name: Of the field.
        shown: What the form's component holds now.

    Returns:
        The new text.

    Raises:
        InputError: If the value is no number or no Python literal, or the class refuses it.
    """
    methods = list(read_methods(text))
    method = methods[index]
    parameter = next(one for one in parameters(method) if one.name == name)
    try:
        methods[index] = dataclasses.replace(method, **{name: _value(parameter, shown)})
    except (TypeError, ValueError) as error:
        raise InputError(str(error), advice=f"Its meaning: {parameter.meaning}") from error
    return write_methods(methods)


def _split(text: str) -> list[str]:
    """Cuts at the " + " between calls, not at one inside of a string."""
    text = text.strip()
    if not text or text.lower() == "none":
        return []
    try:
        node: ast.expr = ast.parse(text, mode="eval").body
    except SyntaxError:
        return [text]  # the parser of methods says what is wrong with it
    parts: list[str] = []
    while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        parts.append(ast.unparse(node.right))
        node = node.left
    return [ast.unparse(node), *reversed(parts)]


def _kind(hint: Any) -> tuple[Any, tuple[Any, ...]]:
    if hint in (bool, int, float, str):
        return hint.__name__, ()
    if typing.get_origin(hint) is Literal:
        return "choice", typing.get_args(hint)
    return "literal", ()


def _value(parameter: Parameter, shown: Any) -> Any:
    name, kind = parameter.name, parameter.kind
    if kind in ("int", "float"):
        if shown is None:
            raise ValueError(f"{name} must be a number, got nothing.")
        if kind == "float":
            return float(shown)
        return int(shown) if shown == int(shown) else shown  # the class says what is wrong with 1.5
    if kind == "str":
        return shown or ""
    if kind != "literal":
        return shown
    text = str(shown or "").strip()
    try:
        return ast.literal_eval(text or "None")
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{name} is written as Python, e.g. None or (0, 1), got {text!r}.") from (
            error
        )
