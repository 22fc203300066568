"""Served names: which methods answer a request, from the name of its model or a field of its own.

``embedded`` is the model as it is. ``embedded+VHR(alpha=2.0)+VAR`` is the same model with methods:
their text form (`mmlm.text_form`) joined by ``+``. Clients of whom only the model's name can be
set, chat front ends for example, so get at every method.

Clients choose among methods and their numbers. What would let them reach further, a class by its
dotted path (an import) or the path of a file, only the operator can name.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from typing import TYPE_CHECKING

import mmlm
from mmlm.errors import InputError, MmlmError
from mmlm.serve.refusals import Refusal, invalid, unfit
from mmlm.text_form import named_files

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["Names", "joined", "split"]

MOST_BEAMS = 8
"""Beams of a method with a search of its own: each is a row of the batch."""

LONGEST = 2000
"""Characters of the text form of a request's methods; far more than any needs."""


def split(text: str) -> list[str]:
    """The parts of ``A(x=1.0)+B``.

    Raises:
        InputError: If it is no sum of calls and names.
    """
    try:
        node = ast.parse(text.strip(), mode="eval").body
        parts: list[ast.expr] = []
        while isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
            parts.append(node.right)
            node = node.left
        parts.append(node)
        if all(isinstance(part, ast.Call | ast.Name | ast.Attribute) for part in parts):
            return [ast.unparse(part) for part in reversed(parts)]
    # MemoryError, RecursionError: what Python's parser says to text that is nested too deeply.
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        pass
    raise InputError(
        f"{text[:200]!r} is not a sum of methods.",
        advice='Write methods as Python calls joined by +: "VHR(alpha=2.0)+VAR".',
    )


def joined(name: str, methods: Sequence[Method]) -> str:
    """The served name of a model with methods, without parameters that have their default."""
    # What stands before the name in the text form of a class outside of mmlm: its module.
    modules = [method.text.removesuffix(repr(method)) for method in methods]
    labels = [module + method.label for module, method in zip(modules, methods, strict=True)]
    return "+".join([name, *labels])


class Names:
    """What requests may call the model.

    Args:
        name: The plain model's name.
        offered: Methods that the operator names, e.g. ``VHR(alpha=2.0)+VAR``. They are listed, and
            what is in them may be asked for even if it imports a class or reads a file.

    Attributes:
        name: As given.
        listed: The names that clients are told of, the plain one first.
        offered: The methods behind the others.

    Raises:
        InputError: If the name holds a ``+``, or a method is unknown or refuses its parameters.
    """

    def __init__(self, name: str, offered: Sequence[str] = ()) -> None:
        if "+" in name or not name:
            raise InputError(
                f"The model would be called {name!r}; + stands between a model and its methods.",
                advice="Give it another name: --name NAME.",
            )
        self.name = name
        texts = list(dict.fromkeys("+".join(split(text)) for text in offered))
        self.listed = (name, *(f"{name}+{text}" for text in texts))
        self.offered = tuple(tuple(map(mmlm.parse_method, split(text))) for text in texts)
        every = [method for methods in self.offered for method in methods]
        self._texts = {method.text for method in every}
        self._given = {part for text in texts for part in split(text)}
        self._paths = {f"{type(m).__module__}.{type(m).__qualname__}" for m in every}

    def methods(self, model: str, chosen: Sequence[str] | None) -> tuple[Method, ...]:
        """The methods of a request.

        Args:
            model: Its ``model``.
            chosen: Its ``mmlm_methods``; None if there is no such field.

        Raises:
            Refusal: If there is no such model or method, or a client may not ask for it.
        """
        before, _, rest = model.partition(self.name)
        rest = rest.strip()
        if before or rest[:1] not in ("", "+"):
            raise Refusal(
                404,
                f"There is no model {model[:200]!r} here; there are: {', '.join(self.listed)}.",
                param="model",
                code="model_not_found",
            )
        if rest and chosen is not None:
            raise invalid(
                "Methods are named in model and in mmlm_methods. Name them in one place.",
                "mmlm_methods",
            )
        param = "model" if rest else "mmlm_methods"
        if len(rest) + sum(map(len, chosen or ())) > LONGEST:
            raise invalid(f"The methods are longer than {LONGEST} characters.", param)
        try:
            texts = split(rest[1:]) if rest else [p for text in chosen or () for p in split(text)]
            return tuple(self._parse(text) for text in texts if text.lower() != "none")
        except MmlmError as error:
            raise unfit(error, param, "invalid_method") from None

    def _parse(self, text: str) -> Method:
        path = text.partition("(")[0].strip()
        if "." in path and path not in self._paths:
            raise InputError(
                f"{path!r} names a class by its path, which clients may not.",
                advice="The operator can offer it: mmlm serve --method.",
            )
        # Before anything is built: a method reads its files when it is made.
        if text not in self._given and (files := named_files(text)):
            raise InputError(
                f"{files[0]} names a file on the server, which clients may not.",
                advice="The operator can offer it: mmlm serve --method.",
            )
        method = mmlm.parse_method(text)
        if method.text in self._texts:
            return method
        if type(method).__module__.startswith("mmlm.probes."):
            raise InputError(
                f"{method.label} measures and changes no answer.", advice="Leave it out."
            )
        if method.beams > MOST_BEAMS:
            raise InputError(
                f"{method.label} has {method.beams} beams; at most {MOST_BEAMS} are taken.",
                advice="Ask for fewer.",
            )
        return method
