"""The data tab: how SENTINEL makes preference pairs out of one picture, step by step."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmlm.errors import InputError
from mmlm.web import data_html
from mmlm.web.data_steps import DrawnScene, Upload, Watch
from mmlm.web.messages import guarded
from mmlm.web.models import twin
from mmlm.web.uploads import checked, picture_field

if TYPE_CHECKING:
    from data_tools.sentinel.settings import SentinelSettings
    from mmlm.web.data_steps import Subject
    from mmlm.web.models import Session

__all__ = ["build"]

_ABOUT = """
SENTINEL samples the next sentence of a caption several times, asks detectors about every object
that a sample names, and pairs a sentence **without** absent objects with one that has some. One
clean sentence then extends the caption. Training on such pairs: `mmlm data sentinel`.
"""
_QUESTION = "describe the image ."
_SCENE, _MINE = "A drawn scene", "My picture"
_KEPT_SECONDS = 1800
"""So long a visitor's picture and what the model keeps of it stay in memory."""


def build(session: Session) -> None:
    """Lays out the tab, inside of its ``gr.Tab``.

    Args:
        session: What the tabs of a page share.
    """
    watch = gr.State(None, time_to_live=_KEPT_SECONDS, delete_callback=_close)
    gr.Markdown(_ABOUT)
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            inputs = [session.model, *_subject_fields(), *_setting_fields()]
            start = gr.Button("Begin", variant="primary", elem_id="data-start")
            with gr.Row():
                off: dict[str, Any] = {"interactive": False, "min_width": 120}
                step = gr.Button("Next sentence", elem_id="data-next", **off)
                rest = gr.Button("To the end", elem_id="data-rest", **off)
        with gr.Column(scale=3, min_width=320):
            look = {"css_template": data_html.style(), "apply_default_css": False}
            with gr.Row():
                with gr.Column(scale=5, min_width=320):
                    steps = gr.HTML("", elem_id="data-steps", **look)
                    file = gr.DownloadButton(
                        "Pairs as JSON lines", visible=False, size="sm", elem_id="data-pairs"
                    )
                with gr.Column(scale=3, min_width=260):
                    known = gr.HTML("", elem_id="data-objects", **look)

    @guarded
    def begin(old: Watch | None, model: str, *values: Any) -> tuple[Any, ...]:
        _close(old)
        subject, question, settings = _read(session, values)
        new = Watch(subject, question, settings, *twin(*session.models.open(model)))
        with session.models.dice:
            new.step()
        return new, *_seen(new)

    @guarded
    def go_on(watch: Watch | None) -> tuple[Any, ...]:
        with session.models.dice:
            _there(watch).step()
        return _seen(_there(watch))

    @guarded
    def to_the_end(watch: Watch | None) -> Iterator[tuple[Any, ...]]:
        while not _there(watch).complete:
            yield go_on(watch)

    shown = [steps, known, step, rest, file]
    slow = {"concurrency_id": "data", "show_progress": "minimal", "show_progress_on": [steps]}
    start.click(begin, [watch, *inputs], [watch, *shown], **slow)
    step.click(go_on, watch, shown, **slow)
    rest.click(to_the_end, watch, shown, **slow)


def _subject_fields() -> tuple[gr.components.Component, ...]:
    """Which picture, who says what is in it, and the question."""
    which = gr.Radio([_SCENE, _MINE], value=_SCENE, label="Picture", elem_id="data-which")
    with gr.Group() as drawn:
        number = gr.Number(17, precision=0, minimum=0, label="Scene", elem_id="data-scene")
        errors = gr.Slider(
            0,
            0.5,
            value=0.1,
            step=0.05,
            label="Errors of the detectors",
            info="Two detectors overlook and invent so many objects; at 0 one knows the truth.",
            elem_id="data-errors",
        )
    with gr.Group(visible=False) as mine:
        picture = picture_field("data-picture", height=220)
        seen = gr.Textbox(
            "",
            label="What do you see?",
            info="Names, with commas between them: they are the detector.",
            placeholder="dog, ball, tree",
            elem_id="data-seen",
        )
    question = gr.Textbox(_QUESTION, label="Question", elem_id="data-question")
    which.input(
        lambda chosen: (gr.update(visible=chosen == _SCENE), gr.update(visible=chosen == _MINE)),
        which,
        [drawn, mine],
        queue=False,
    )
    return which, number, errors, picture, seen, question


def _setting_fields() -> tuple[gr.components.Component, ...]:
    """The settings of SENTINEL that change most."""
    from data_tools.sentinel.settings import SentinelSettings

    usual = SentinelSettings()
    with gr.Accordion("Settings", open=False):
        return (
            gr.Slider(2, 20, value=usual.n, step=1, label="Samples per step", elem_id="data-n"),
            gr.Number(usual.temperature, label="Temperature", elem_id="data-temperature"),
            gr.Slider(
                1, 16, value=6, step=1, label="Sentences at most", elem_id="data-max-sentences"
            ),
            gr.Radio(
                ["order", "matched", "same_form"],
                value=usual.pairing,
                label="Pairing",
                info="Which clean sentence meets which hallucinated one.",
                elem_id="data-pairing",
            ),
            gr.Checkbox(
                usual.allow_agnostic_pairs,
                label="Clean sentences about something new may win too",
                elem_id="data-agnostic",
            ),
            gr.Number(usual.seed, precision=0, label="Seed", elem_id="data-seed"),
        )


def _read(session: Session, values: tuple[Any, ...]) -> tuple[Subject, str, SentinelSettings]:
    """The fields as objects; these refuse what is out of range."""
    from data_tools.sentinel.settings import SentinelSettings

    which, number, errors, picture, seen, question, *numbers = values
    n, temperature, sentences, pairing, agnostic, seed = numbers
    settings = SentinelSettings(
        n=int(n),
        temperature=float(temperature or 0),
        max_sentences=int(sentences),
        pairing=pairing,
        allow_agnostic_pairs=bool(agnostic),
        seed=int(seed or 0),
    )
    if which == _SCENE:
        return DrawnScene(int(number or 0), float(errors)), question, settings
    names = tuple(name.strip().lower() for name in (seen or "").split(",") if name.strip())
    return Upload(_path(session, picture), names, session.detector), question, settings


def _path(session: Session, picture: str | None) -> Path:
    """The visitor's file, once it was decoded within the limits."""
    if not picture:
        raise InputError("There is no picture.", advice="Drop one into the field, or draw a scene.")
    checked(picture, session.limits)
    return Path(picture)


def _there(watch: Watch | None) -> Watch:
    if watch is None:
        raise InputError("Nothing was begun.", advice="Click Begin.")
    return watch


def _seen(watch: Watch) -> tuple[Any, ...]:
    """What changes on the page after a step."""
    button = gr.update(interactive=not watch.complete)
    file = gr.update(value=_as_file(watch) if watch.pairs else None, visible=bool(watch.pairs))
    return data_html.steps(watch), data_html.knowledge(watch), button, button, file


def _as_file(watch: Watch) -> str:
    """The pairs, where Gradio finds them for a download; gone when the watch is closed."""
    path = watch.folder / "pairs.jsonl"
    lines = (json.dumps(pair, ensure_ascii=False) + "\n" for pair in watch.pairs)
    path.write_text("".join(lines), encoding="utf-8")
    return str(path)


def _close(watch: Watch | None) -> None:
    if watch is not None:
        watch.close()
