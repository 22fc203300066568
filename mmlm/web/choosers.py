"""A column's method on the page: a name to choose, its call as text, and a form of its fields."""

from __future__ import annotations

import functools
from typing import Any

import gradio as gr

import mmlm
from mmlm.errors import MmlmError
from mmlm.pages import escaped
from mmlm.web.messages import guarded
from mmlm.web.method_forms import Parameter, parameters, read_methods, start_text, with_value

__all__ = ["chooser"]

_NONE = "no method"


def chooser(place: int, model: gr.Dropdown) -> gr.Textbox:
    """Lays out one column's method.

    Args:
        place: 1 to 4; part of the element ids.
        model: The component with the model's name: recommended settings depend on it.

    Returns:
        The field with the text form; empty if the column is not used.
    """
    with gr.Group(elem_classes="chooser"):
        name = gr.Dropdown(
            [_NONE, *mmlm.method_names()],
            value=_NONE,
            label=f"Method {place}",
            elem_id=f"method-{place}",
        )
        text = gr.Textbox(
            "",
            label="As text",
            show_label=False,
            visible=False,
            elem_id=f"method-{place}-text",
            elem_classes="call",
        )
        note = gr.HTML("", elem_id=f"method-{place}-note")
        with gr.Accordion(
            "Parameters", open=False, visible=False, elem_id=f"method-{place}-form"
        ) as form:

            @gr.render([text], triggers=[name.input, text.submit])
            def fields(current: str) -> None:
                _fields(place, current, text, note)

    @guarded
    def choose(name: str, model: str) -> tuple[Any, ...]:
        chosen = "" if name == _NONE else start_text(name, model)
        shown = gr.update(visible=bool(chosen))
        return gr.update(value=chosen, visible=bool(chosen)), shown, ""

    name.input(choose, [name, model], [text, form, note], queue=False)
    return text


def _fields(place: int, current: str, text: gr.Textbox, note: gr.HTML) -> None:
    """The fields of all methods of a column; a change of one writes the text anew."""
    try:
        methods = read_methods(current)
    except MmlmError:
        return
    for index, method in enumerate(methods):
        if len(methods) > 1:
            gr.Markdown(f"**{type(method).__name__}**")
        for parameter in parameters(method):
            field = _component(parameter, f"param-{place}-{index}-{parameter.name}")
            change = functools.partial(_change, index, parameter.name)
            field.input(change, [text, field], [text, note], queue=False, show_progress="hidden")


def _change(index: int, name: str, text: str, value: Any) -> tuple[str, str]:
    try:
        return with_value(text, index, name, value), ""
    except MmlmError as error:
        return text, f'<p class="refused">{escaped(str(error))} <em>Not applied.</em></p>'


def _component(parameter: Parameter, elem_id: str) -> Any:
    common = {"label": parameter.name, "info": parameter.meaning, "elem_id": elem_id}
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
            return gr.Textbox(parameter.shown, **common)
