"""A column's methods on the page: a name to choose, its call as text, and a form of its fields."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr

import mmlm
from mmlm.errors import MmlmError
from mmlm.pages import escaped
from mmlm.web.messages import guarded
from mmlm.web.method_forms import (
    Parameter,
    method_names,
    parameters,
    read_methods,
    start_text,
    with_value,
)

__all__ = ["Chooser", "connect", "lay_out", "set_all"]

_NONE = "none"
#: Makes every form that is built anew differ from the one before, also for an equal text.
_ISSUE = itertools.count()
#: Through the queue, as only that tells the page that a state has changed, and without waiting.
_AT_ONCE: dict[str, Any] = {"concurrency_limit": None, "show_progress": "hidden"}


@dataclass(frozen=True)
class Chooser:
    """The parts of one column's choice.

    Attributes:
        place: 1, 2, ...; part of the element ids.
        group: Around everything.
        name: The method's name.
        text: The methods as text; empty if the column is not used.
        note: What was refused.
        form: Around the fields.
        built: The text that the fields were made for.
    """

    place: int
    group: gr.Group
    name: gr.Dropdown
    text: gr.Textbox
    note: gr.HTML
    form: gr.Accordion
    built: gr.State

    @property
    def parts(self) -> list[Any]:
        """In the order of `_set`."""
        return [self.group, self.name, self.text, self.note, self.form, self.built]


def lay_out(texts: Sequence[str], places: int) -> tuple[Chooser, ...]:
    """Puts the choices of all columns on the page; those behind the next free one are hidden.

    Args:
        texts: Methods by column that the page starts with.
        places: How many columns there are.
    """
    own = [name for text in texts for name in method_names(text)]
    names = list(dict.fromkeys([_NONE, *mmlm.method_names(), *own]))
    return tuple(
        _chooser(place, text, names, shown=shown)
        for place, (text, shown) in enumerate(_padded(texts, places), 1)
    )


def _padded(texts: Sequence[str], places: int) -> list[tuple[str, bool]]:
    """Text and visibility of every column."""
    padded = [*texts, *[""] * (places - len(texts))]
    return [
        (text, bool(text) or place == 0 or bool(padded[place - 1]))
        for place, text in enumerate(padded)
    ]


def _chooser(place: int, text: str, names: Sequence[str], *, shown: bool) -> Chooser:
    used = bool(text)
    with gr.Group(visible=shown, elem_classes="chooser") as group:
        name = gr.Dropdown(
            list(names),
            value=_name(text),
            label=f"Method {place}",
            elem_id=f"method-{place}",
        )
        call = gr.Textbox(
            text,
            label="As text",
            show_label=False,
            visible=used,
            elem_id=f"method-{place}-text",
            elem_classes="call",
            html_attributes=gr.InputHTMLAttributes(
                spellcheck=False, autocapitalize="off", autocorrect="off"
            ),
        )
        note = gr.HTML("", elem_id=f"method-{place}-note", elem_classes="note")
        built = gr.State((text, next(_ISSUE)))
        with gr.Accordion(
            "Parameters", open=False, visible=used, elem_id=f"method-{place}-form"
        ) as form:

            @gr.render([built], show_progress="hidden")
            def fields(built: tuple[str, int]) -> None:
                _fields(place, built[0], call, note)

    return Chooser(place, group, name, call, note, form, built)


def connect(choosers: Sequence[Chooser], model: gr.Dropdown) -> None:
    """Makes names, texts and forms follow one another; a column used shows the next one.

    Args:
        choosers: Of all columns.
        model: The component with the model's name: recommended settings depend on it.
    """
    for chooser, following in itertools.zip_longest(choosers, choosers[1:]):
        rest = [] if following is None else [following.group]

        def by_name(name: str, model: str, more: bool = bool(rest)) -> list[Any]:
            text = "" if name == _NONE else start_text(name, model)
            return [*_set(text, shown=True), *[gr.update(visible=True)] * (more and bool(text))]

        def by_text(text: str, built: tuple[str, int]) -> list[Any]:
            if text == built[0]:
                return _only_note("")
            try:
                read_methods(text)
            except MmlmError as error:
                return _only_note(_refused(error))
            return _set(text, shown=True)

        outputs = [*chooser.parts, *rest]
        chooser.name.input(
            _filled(by_name, len(outputs)),
            [chooser.name, model],
            outputs,
            **_AT_ONCE,
        )
        for trigger in (chooser.text.submit, chooser.text.blur):
            trigger(guarded(by_text), [chooser.text, chooser.built], chooser.parts, **_AT_ONCE)


def set_all(texts: Sequence[str], places: int) -> list[Any]:
    """Updates for the parts of all choosers, in order.

    Args:
        texts: Methods by column, from the first on.
        places: How many columns there are.
    """
    given = _padded(texts, places)
    return [update for text, shown in given for update in _set(text, shown=shown)]


def _filled(function: Any, count: int) -> Any:
    """A guarded function whose answer is as long as its outputs."""

    def run(*values: Any) -> list[Any]:
        given = function(*values)
        return [*given, *[gr.skip()] * (count - len(given))]

    return guarded(run)


def _set(text: str, *, shown: bool) -> list[Any]:
    used = bool(text)
    return [
        gr.update(visible=shown),
        _name(text),
        gr.update(value=text, visible=used),
        "",
        gr.update(visible=used),
        (text, next(_ISSUE)),
    ]


def _only_note(note: str) -> list[Any]:
    return [gr.skip(), gr.skip(), gr.skip(), note, gr.skip(), gr.skip()]


def _name(text: str) -> str:
    return next(iter(method_names(text)), _NONE)


def _fields(place: int, text: str, call: gr.Textbox, note: gr.HTML) -> None:
    """The fields of all methods of a column; a change of one writes the text anew."""
    methods = read_methods(text)
    for index, method in enumerate(methods):
        if len(methods) > 1:
            gr.Markdown(f"**{type(method).__name__}**")
        for parameter in parameters(method):
            field = _component(parameter, f"param-{place}-{index}-{parameter.name}")
            change = functools.partial(_change, index, parameter.name)
            field.input(change, [call, field], [call, note], **_AT_ONCE)


def _change(index: int, name: str, text: str, value: Any) -> tuple[Any, str]:
    try:
        return with_value(text, index, name, value), ""
    except MmlmError as error:
        return gr.skip(), _refused(error)


def _refused(error: MmlmError) -> str:
    return (
        f'<p class="refused" role="alert">{escaped(str(error))} <em>{escaped(error.advice)} '
        "Nothing was changed.</em></p>"
    )


def _component(parameter: Parameter, elem_id: str) -> Any:
    common = {
        "label": parameter.name,
        "info": parameter.meaning,
        "elem_id": elem_id,
        "interactive": True,
    }
    match parameter.kind:
        case "bool":
            return gr.Checkbox(parameter.shown, **common)
        case "choice":
            return gr.Dropdown(list(parameter.choices), value=parameter.shown, **common)
        case "int":
            return gr.Number(parameter.shown, precision=0, **common)
        case "float":
            return gr.Number(parameter.shown, step=0.1, **common)
        case _:
            return gr.Textbox(parameter.shown, max_lines=3, **common)
