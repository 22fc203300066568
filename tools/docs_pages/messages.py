"""Every error message with its advice, read from the source; the page of them in the site.

A message is what stands in the call that makes the error. What is only known at run time is shown
as ``<name>``; where the source chooses between texts, all of them are listed.
"""

from __future__ import annotations

import ast
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass

from docs_pages.api import rooms
from docs_pages.source import Module, modules

#: How far names are followed: a constant of a constant, an argument of a caller ...
DEPTH = 5
#: Texts of one expression; more would be a table, not a message.
MOST = 12

INTRODUCTION = """# Error messages

Every message that mmlm can print, with its cure, read from the source while this page was built:
look for the words that do not change from run to run. What is only known at run time stands in
angle brackets. What the kinds of errors mean is said in [Troubleshooting](troubleshooting.md).
"""


@dataclass(frozen=True)
class Message:
    """One place in the source that makes an error."""

    module: str
    kind: str
    line: int
    texts: tuple[str, ...]
    advice: tuple[str, ...]
    passed_on: bool = False

    @property
    def says_what_to_do(self) -> bool:
        """Whether there is advice in words, or that of the error's cause is passed on."""
        return self.passed_on or any(_words(text) for text in self.advice)


@functools.cache
def error_classes() -> dict[str, tuple[str, str]]:
    """Every public exception of ours, by name: its module, and the first line of its text."""
    defined = {
        node.name: (module.name, node)
        for module in modules()
        for node in module.tree.body
        if isinstance(node, ast.ClassDef) and not node.name.startswith("_")
    }
    known = {"Exception", "ValueError"}
    while True:
        more = {
            name
            for name, (_, node) in defined.items()
            if any(ast.unparse(base).split(".")[-1] in known for base in node.bases)
        }
        if more <= known:
            break
        known |= more
    return {
        name: (where, (ast.get_docstring(node) or "").partition("\n")[0])
        for name, (where, node) in sorted(defined.items())
        if name in known
    }


def ours() -> frozenset[str]:
    """The classes that carry advice: :class:`mmlm.errors.MmlmError` and what derives from it."""
    import mmlm.errors

    names = {name for name in mmlm.errors.__all__ if name[0].isupper()}
    bases = {
        node.name: {ast.unparse(base).split(".")[-1] for base in node.bases}
        for module in modules()
        for node in module.tree.body
        if isinstance(node, ast.ClassDef)
    }
    while more := {name for name, above in bases.items() if above & names} - names:
        names |= more
    return frozenset(names)


@functools.cache
def messages() -> tuple[Message, ...]:
    """All of them, in the order of the source."""
    kinds = ours()
    found = []
    for module in modules():
        for call, inside in _calls(module.tree):
            kind = ast.unparse(call.func).split(".")[-1]
            if kind not in kinds and kind != "ValueError":
                continue
            read = Reader(module, inside)
            advice = next((k.value for k in call.keywords if k.arg == "advice"), None)
            # raise_for and subclasses hand their own texts on: those are met where they are made.
            texts = read.texts(call.args[0]) if call.args else ()
            found.append(
                Message(
                    module.name,
                    kind,
                    call.lineno,
                    texts,
                    read.texts(advice) if advice is not None else (),
                    isinstance(advice, ast.Attribute) and advice.attr == "advice",
                )
            )
    return tuple(found)


def _calls(tree: ast.Module) -> Iterator[tuple[ast.Call, tuple[ast.AST, ...]]]:
    """Every call with the functions around it, the innermost first."""

    def walk(node: ast.AST, inside: tuple[ast.AST, ...]) -> Iterator[tuple[ast.Call, tuple]]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Call):
                yield child, inside
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
            yield from walk(child, (child, *inside) if is_function else inside)

    yield from walk(tree, ())


@functools.cache
def _by_name() -> dict[str, Module]:
    return {module.name: module for module in modules()}


class Reader:
    """Reads the texts that an expression may have, without running anything."""

    def __init__(self, module: Module, inside: tuple[ast.AST, ...]) -> None:
        self._module = module
        self._inside = inside

    def texts(self, node: ast.AST, depth: int = DEPTH) -> tuple[str, ...]:
        """All texts, in the order of the source and each once."""
        found = dict.fromkeys(self._read(node, depth))
        return tuple(itertools.islice(found, MOST))

    def _read(self, node: ast.AST, depth: int) -> Iterator[str]:
        match node:
            case ast.Constant(value=str() as text):
                yield text
            case ast.JoinedStr(values=parts):
                yield from self._joined(parts, depth)
            case ast.FormattedValue(value=inner):
                yield from self._value(inner, depth)
            case ast.BinOp(op=ast.Add(), left=left, right=right):
                yield from self._joined([left, right], depth)
            case ast.IfExp(body=yes, orelse=no):
                yield from self._read(yes, depth)
                yield from self._read(no, depth)
            case ast.BoolOp(op=ast.Or(), values=choices):
                for choice in choices:
                    yield from self._read(choice, depth)
            case ast.Name(id=name) if depth:
                yield from self._name(name, depth - 1) or [_shown(node)]
            case ast.Call(func=ast.Name(id=name)) if depth:
                yield from self._returned(name, depth - 1) or [_shown(node)]
            case _:
                yield _shown(node)

    def _returned(self, name: str, depth: int) -> list[str]:
        """What a function of ours returns, if that is words."""
        module = _by_name().get(self._module.origin(name), self._module)
        for function in module.tree.body:
            if isinstance(function, ast.FunctionDef) and function.name == name:
                values = [n.value for n in ast.walk(function) if isinstance(n, ast.Return)]
                reader = Reader(module, (function,))
                texts = [t for value in values if value for t in reader.texts(value, depth)]
                return [text for text in texts if _words(text)]
        return []

    def _joined(self, parts: list[ast.AST] | list[ast.expr], depth: int) -> Iterator[str]:
        choices = [self.texts(part, depth) for part in parts]
        for chosen in itertools.islice(itertools.product(*choices), MOST):
            yield "".join(chosen)

    def _value(self, node: ast.expr, depth: int) -> Iterator[str]:
        """A value inside a text: its own words if it chooses between some, else its name."""
        if isinstance(node, ast.Constant):
            yield str(node.value)
        elif isinstance(node, ast.IfExp | ast.Name) and depth:
            # A default is a value like any other, not a part of the sentence.
            read = (
                self._name(node.id, depth - 1, defaults=False)
                if isinstance(node, ast.Name)
                else list(self._read(node, depth))
            )
            yield from read if read and all(map(_words, read)) else [_shown(node)]
        else:
            yield _shown(node)

    def _name(self, name: str, depth: int, *, defaults: bool = True) -> list[str]:
        """What a name may stand for: set in the function, handed to it, or set in a module."""
        for function in self._inside:
            assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            set_here = [value for target, value in _assignments(function) if target == name]
            if set_here:
                return [text for value in set_here for text in self._read(value, depth)]
            names = [a.arg for a in (*function.args.args, *function.args.kwonlyargs)]
            if name in names:
                return self._handed(function, name, depth, defaults)
        for module in (self._module, _by_name().get(self._module.origin(name))):
            for target, value in _assignments(module.tree) if module else ():
                if target == name:
                    return list(Reader(module, ()).texts(value, depth))
        return []

    def _handed(self, function: ast.AST, name: str, depth: int, with_default: bool) -> list[str]:
        """An argument: its default, and what the callers in the module give."""
        assert isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
        positional = [a.arg for a in function.args.args]
        given = []
        if positional and positional[0] in ("self", "cls"):
            positional = positional[1:]
        defaults = dict(zip(reversed(positional), reversed(function.args.defaults), strict=False))
        only = zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)
        defaults |= {argument.arg: value for argument, value in only if value is not None}
        if name in defaults and with_default:
            given.append((defaults[name], ()))
        for call, inside in _calls(self._module.tree):
            if ast.unparse(call.func).split(".")[-1] != function.name:
                continue
            by_name = {k.arg: k.value for k in call.keywords}
            if name in by_name:
                given.append((by_name[name], inside))
            elif name in positional and len(call.args) > positional.index(name):
                given.append((call.args[positional.index(name)], inside))
        return [
            text
            for value, inside in given
            for text in Reader(self._module, inside).texts(value, depth)
        ]


def _assignments(scope: ast.AST) -> Iterator[tuple[str, ast.expr]]:
    """Names that a scope sets, with the values; several of one statement one by one."""
    for node in ast.walk(scope):
        if isinstance(node, ast.Assign):
            for target in node.targets:
                if isinstance(target, ast.Name):
                    yield target.id, node.value
                elif isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
                    for element, value in zip(target.elts, node.value.elts, strict=False):
                        if isinstance(element, ast.Name):
                            yield element.id, value
        elif isinstance(node, ast.AnnAssign | ast.NamedExpr) and node.value is not None:
            if isinstance(node.target, ast.Name):
                yield node.target.id, node.value


def _shown(node: ast.AST) -> str:
    """A value that is only known at run time, by the last name in it."""
    match node:
        case ast.Name(id=name):
            return f"<{name.strip('_')}>"
        case ast.Attribute(attr="__name__", value=inner):
            return _shown(inner)
        case ast.Attribute(attr=name):
            return f"<{name.strip('_')}>"
        case ast.Call(func=ast.Attribute(attr="join"), args=[inner, *_]):
            return _shown(inner)
        case ast.Call(func=ast.Name(id="str" | "repr" | "type" | "sorted" | "list"), args=[inner]):
            return _shown(inner)
        case ast.Call(func=ast.Name(id="len")):
            return "<number>"
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return f"<{name.strip('_')}>"
        case ast.Subscript(value=inner):
            return _shown(inner)
        case ast.GeneratorExp(elt=inner) | ast.ListComp(elt=inner):
            return _shown(inner)
        case _:
            return "<...>"


def _words(text: str) -> bool:
    """Whether anything stands outside the angle brackets."""
    outside = "".join(part.partition(">")[2] for part in f">{text}".split("<"))
    return any(character.isalpha() for character in outside)


def messages_page() -> str:
    """The page of all messages, by room and module."""
    by_module: dict[str, list[Message]] = defaultdict(list)
    for message in messages():
        by_module[message.module].append(message)
    lines = [INTRODUCTION]
    placed = {m.name: room for room, members in rooms().items() for m in members}
    by_room: dict[str, list[str]] = defaultdict(list)
    for name in by_module:
        by_room[placed.get(name, ".".join(name.split(".")[:2]))].append(name)
    for room in sorted(by_room):
        lines += [f"## {room}", ""]
        for name in by_room[room]:
            lines += [f"### {name}", ""]
            lines += [line for message in by_module[name] for line in _entry(message)]
            lines.append("")
    return "\n".join(lines)


def _entry(message: Message) -> list[str]:
    """One place: its texts, then what to do."""
    said = "<br>".join(_code(text) for text in message.texts) or "*(lists what is out of place)*"
    cure = " *or* ".join(_plain(text) for text in message.advice if _words(text))
    if message.kind == "ValueError":
        cure = "Give what the message allows."
    elif message.passed_on and not cure:
        cure = "The advice of the error that caused this one."
    kind = message.kind
    link = kind if kind == "ValueError" else f"[{kind}](troubleshooting.md#{kind.lower()})"
    return [f"- {said}<br>{link}. **Cure:** {cure}", ""]


def _code(text: str) -> str:
    return f"<code>{_escaped(' '.join(text.split()))}</code>"


def _plain(text: str) -> str:
    """Advice: what stands between backticks is code."""
    parts = " ".join(text.split()).split("`")
    if len(parts) % 2 == 0:  # a lone backtick is only a sign
        return _escaped("`".join(parts))
    return "".join(_code(p) if odd % 2 else _escaped(p) for odd, p in enumerate(parts))


#: Text that Markdown and HTML leave alone.
_SIGNS = str.maketrans({sign: f"&#{ord(sign)};" for sign in "&<>\\`*_[]{}|#"})


def _escaped(text: str) -> str:
    return text.translate(_SIGNS)
