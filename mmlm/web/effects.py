"""The effects tab: what methods change in CHAIR, on scenes that are described while one watches."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from tempfile import NamedTemporaryFile
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmlm.cli.options import EMBEDDED
from mmlm.web import effects_html
from mmlm.web.effects_run import MOST_METHODS, MOST_PICTURES, Plan, measure
from mmlm.web.messages import guarded

if TYPE_CHECKING:
    from mmlm.web.effects_run import Progress
    from mmlm.web.models import Session

__all__ = ["build"]

_ABOUT = """
Scenes whose content is known are described plainly and with each method; CHAIR counts the objects
that captions name and the scene does not hold. All ways describe the same pictures, so changes are
paired: what stays **within noise** is no effect.
"""
_START = ("VHR(alpha=2.0)",)


@dataclass
class _Switch:
    """One visitor's stop button; Gradio gives every visitor a copy."""

    stopped: bool = False


def build(session: Session) -> None:
    """Lays out the tab, inside of its ``gr.Tab``.

    Args:
        session: What the tabs of a page share.
    """
    from data_tools.world import SPLITS

    switch = gr.State(_Switch(), delete_callback=_stop)
    gr.Markdown(_ABOUT)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            methods = gr.Dropdown(
                _choices(session.models.names[0]),
                value=list(_START),
                label="Methods",
                info="Choose up to four, or type one: VHR(alpha=3.0), VCD() + VHR()",
                multiselect=True,
                max_choices=MOST_METHODS,
                allow_custom_value=True,
                elem_id="effects-methods",
            )
            taken = gr.Button("Take those of Compare", size="sm", elem_id="effects-take")
            count = gr.Slider(
                1, MOST_PICTURES, value=60, step=1, label="Scenes", elem_id="effects-count"
            )
            with gr.Accordion("Which scenes, which question", open=False):
                split = gr.Dropdown(
                    list(SPLITS), value="natural", label="Kind of scenes", elem_id="effects-split"
                )
                seed = gr.Number(0, precision=0, label="Seed", elem_id="effects-seed")
                question = gr.Textbox(Plan.question, label="Question", elem_id="effects-question")
            with gr.Row():
                start = gr.Button(
                    "Measure", variant="primary", min_width=120, elem_id="effects-start"
                )
                stop = gr.Button("Stop", interactive=False, min_width=120, elem_id="effects-stop")
        with gr.Column(scale=3, min_width=320):
            look = {"css_template": effects_html.style(), "apply_default_css": False}
            bar = gr.HTML("", elem_id="effects-progress", **look)
            shown = gr.HTML("", elem_id="effects-numbers", **look)
            file = gr.DownloadButton(
                "Numbers as JSON", visible=False, size="sm", elem_id="effects-json"
            )

    @guarded
    def run(
        name: str,
        methods: list[str],
        count: int,
        split: str,
        seed: int | None,
        question: str,
        switch: _Switch,
    ) -> Iterator[tuple[Any, ...]]:
        plan = Plan(tuple(methods or ()), split, int(count), int(seed or 0), question)
        plan.ways()
        switch.stopped = False
        yield "", "", gr.update(visible=False)
        with session.models.borrow(name) as (model, processor):
            for step in measure(
                model,
                processor,
                plan,
                turn=lambda: session.models.dice,
                stopped=lambda: switch.stopped,
            ):
                yield _seen(step, plan)
        if step.latest is not None:
            yield *_seen(step, plan)[:2], gr.update(value=_as_file(step), visible=True)

    inputs = [session.model, methods, count, split, seed, question, switch]
    running = start.click(_busy, None, [start, stop], queue=False).then(
        run,
        inputs,
        [bar, shown, file],
        concurrency_id="effects",
        show_progress="minimal",
        show_progress_on=[bar],
    )
    for end in (running.success, running.failure):  # Gradio's "then" is not called after an error
        end(_idle, None, [start, stop], queue=False)
    stop.click(_stop, switch, None, queue=False)
    taken.click(_taken, list(session.methods), methods, queue=False)
    session.model.change(
        lambda name: gr.update(choices=_choices(name)), session.model, methods, queue=False
    )


def _choices(model: str) -> list[tuple[str, str]]:
    """Settings to choose among: on the embedded model the measured ones, else the defaults."""
    import mmlm
    from mmlm.cli.configs import effect_label, effect_settings

    if model != EMBEDDED:
        return [(f"{name}()", f"{name}()") for name in mmlm.method_names()]
    known = [text for texts in effect_settings(EMBEDDED).values() for text in texts]
    return [(effect_label(text), text) for text in known]


def _seen(step: Progress, plan: Plan) -> tuple[Any, ...]:
    return effects_html.progress(step), effects_html.numbers(step, plan), gr.skip()


def _as_file(step: Progress) -> str:
    """The numbers, where Gradio finds them for a download."""
    from benchmarks.reports import compare_tables

    with NamedTemporaryFile("w", prefix="effects-", suffix=".json", delete=False) as file:
        json.dump(compare_tables.as_json(step.latest), file, indent=2)
    return file.name


def _busy() -> tuple[Any, Any]:
    return gr.update(interactive=False), gr.update(interactive=True)


def _idle() -> tuple[Any, Any]:
    return gr.update(interactive=True), gr.update(interactive=False)


def _stop(switch: _Switch) -> None:
    switch.stopped = True


@guarded
def _taken(*texts: str) -> list[str]:
    """The methods of the compare tab that are in use."""
    return [text for text in texts if text and text.strip()]
