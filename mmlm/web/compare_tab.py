"""The compare tab on the page: what stands where, and which event calls what."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmlm.web import choosers, compare
from mmlm.web.answers import Clicked, talk_html, truth_html
from mmlm.web.compare import Talk
from mmlm.web.messages import guarded
from mmlm.web.settings import COLUMNS, FIRST_QUESTION, LONGEST_QUESTION, Chosen, from_json
from mmlm.web.theme import script
from mmlm.web.uploads import picture_field

if TYPE_CHECKING:
    from mmlm.web.models import Session

__all__ = ["build"]

_FIRST = Chosen()
_SCENES = 100_000
_EMPTY = (
    '<div class="empty"><p>Ask, and the plain model and every method you choose answer side by '
    'side. Objects that are <mark class="bad">invented</mark> are marked, and those that are '
    '<mark class="good">in the picture</mark>. Click a word to see where the model looked.</p>'
    "</div>"
)


@dataclass(frozen=True)
class _Parts:
    """The components of the tab that several events share."""

    talk: gr.State
    picture: gr.Image
    truth: gr.HTML
    draw: gr.Button
    scene: gr.Number
    methods: tuple[choosers.Chooser, ...]
    generate: dict[str, Any]
    question: gr.Textbox
    ask: gr.Button
    stop: gr.Button
    new: gr.Button
    answers: gr.HTML
    link: gr.Button
    save: gr.Button
    load: gr.UploadButton
    handed: gr.Textbox

    @property
    def texts(self) -> list[gr.Textbox]:
        return [chooser.text for chooser in self.methods]

    @property
    def view(self) -> list[Any]:
        """What changes with the picture."""
        return [self.picture, self.scene, self.truth, self.answers]


def build(session: Session) -> tuple[gr.Textbox, ...]:
    """Lays out the tab and connects it.

    Args:
        session: What the tabs share.

    Returns:
        The fields with the methods of each column as text.
    """
    parts = _lay_out(session)
    choosers.connect(parts.methods, session.model)
    _connect_picture(session, parts)
    _connect_talk(session, parts)
    _connect_settings(session, parts)
    return tuple(parts.texts)


def _lay_out(session: Session) -> _Parts:
    talk = gr.State(Talk())
    # In the order of a phone; on wide screens the choices stand below the picture.
    with gr.Row(elem_classes="compare"):
        with gr.Column(elem_classes="view-area"):
            picture, truth, draw, scene = _picture_parts()
        with gr.Column(elem_classes="talk-area"):
            question, ask, stop, new = _question_parts()
            answers = gr.HTML(_EMPTY, elem_id="answers", js_on_load=script("answers.js"))
        with gr.Column(elem_classes="choices-area"):
            methods = choosers.lay_out(session.start, COLUMNS)
            generate = _generate_parts(session.limits.new_tokens)
            link, save, load, handed = _settings_parts()
    return _Parts(
        talk, picture, truth, draw, scene, methods, generate, question, ask, stop, new, answers,
        link, save, load, handed,
    )  # fmt: skip


def _picture_parts() -> tuple[gr.Image, gr.HTML, gr.Button, gr.Number]:
    with gr.Group(elem_classes="view"):
        picture = picture_field("picture")
        truth = gr.HTML(truth_html(None), elem_id="truth")
    with gr.Row(elem_classes="tight scene"):
        draw = gr.Button("Draw another scene", elem_id="draw", min_width=150, scale=1)
        scene = gr.Number(
            _FIRST.scene,
            label="Number of the scene",
            show_label=False,
            container=False,
            precision=0,
            minimum=0,
            elem_id="scene-number",
            min_width=90,
            scale=0,
        )
    return picture, truth, draw, scene


def _generate_parts(most_tokens: int) -> dict[str, Any]:
    first = dict(_FIRST.generate)
    with gr.Accordion("How to answer", open=False, elem_id="generate"):
        tokens = gr.Slider(
            1,
            most_tokens,
            value=min(first["max_new_tokens"], most_tokens),
            step=1,
            label="Most new tokens",
            elem_id="gen-max_new_tokens",
        )
        beams = gr.Slider(1, 16, value=1, step=1, label="Beams", elem_id="gen-num_beams")
        sample = gr.Checkbox(first["do_sample"], label="Draw tokens at random",
                             elem_id="gen-do_sample")  # fmt: skip
        drawn = {"interactive": False, "min_width": 100}
        with gr.Row(elem_classes="tight"):
            temperature = gr.Number(
                1.0, label="Temperature", step=0.1, elem_id="gen-temperature", **drawn
            )
            top_p = gr.Number(1.0, label="Top p", step=0.05, elem_id="gen-top_p", **drawn)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, elem_id="gen-seed")
    sample.change(
        lambda on: [gr.update(interactive=on)] * 2,
        sample,
        [temperature, top_p],
        queue=False,
        show_progress="hidden",
    )
    return {
        "max_new_tokens": tokens,
        "do_sample": sample,
        "num_beams": beams,
        "temperature": temperature,
        "top_p": top_p,
        "seed": seed,
    }


def _settings_parts() -> tuple[gr.Button, gr.Button, gr.UploadButton, gr.Textbox]:
    with gr.Row(elem_classes="tight settings"):
        link = gr.Button("Copy link", elem_id="link", size="sm", min_width=80)
        save = gr.Button("Save settings", elem_id="save-settings", size="sm", min_width=80)
        load = gr.UploadButton(
            "Load settings",
            elem_id="load-settings",
            size="sm",
            min_width=80,
            file_types=[".json"],
        )
    # What a script of the page takes over: it cannot be handed a value in another way.
    handed = gr.Textbox(visible="hidden", elem_id="handed", show_label=False)
    return link, save, load, handed


def _question_parts() -> tuple[gr.Textbox, gr.Button, gr.Button, gr.Button]:
    with gr.Row(elem_classes="tight bar"):
        question = gr.Textbox(
            FIRST_QUESTION,
            label="Question",
            show_label=False,
            container=False,
            placeholder="Ask about the picture",
            max_length=LONGEST_QUESTION,
            elem_id="question",
            scale=1,
            min_width=180,
        )
        ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=80)
        stop = gr.Button(
            "Stop", variant="stop", elem_id="stop", scale=0, min_width=80, visible=False
        )
        new = gr.Button("New talk", elem_id="new-talk", scale=0, min_width=96)
    return question, ask, stop, new


def _connect_picture(session: Session, parts: _Parts) -> None:
    @guarded
    def show(talk: Talk, number: float | None) -> list[Any]:
        return _scene(talk, number)

    @guarded
    def another(talk: Talk) -> list[Any]:
        return _scene(talk, random.randrange(_SCENES))

    def take(talk: Talk, path: str | None) -> Iterator[list[Any]]:
        # Cleared at once: a file that is refused must not stay in view as if it were asked about.
        try:
            truth = compare.show_upload(session, talk, path)
        except Exception:
            yield [None, gr.skip(), "", _EMPTY]
            raise
        yield [gr.skip(), gr.skip(), truth, _EMPTY]

    talk = parts.talk
    parts.draw.click(another, talk, parts.view, show_progress="hidden")
    parts.scene.submit(show, [talk, parts.scene], parts.view, show_progress="hidden")
    for event in (parts.picture.upload, parts.picture.clear):
        event(guarded(take), [talk, parts.picture], parts.view, show_progress="hidden")


def _connect_talk(session: Session, parts: _Parts) -> None:
    @guarded
    def run(talk: Talk, model: str, question: str, *values: Any) -> Iterator[str]:
        texts, generate = values[:COLUMNS], dict(zip(parts.generate, values[COLUMNS:], strict=True))
        yield from compare.ask(session, talk, model, question, texts, generate)

    @guarded
    def click(talk: Talk, event: gr.EventData) -> Iterator[str]:
        turn, *clicked = (int(event._data[name]) for name in ("turn", "column", "start", "end"))
        yield from compare.word(session, talk, turn, Clicked(*clicked))

    def busy(talk: Talk, question: str) -> list[Any]:
        # At once, before the queue: others may be asking.
        return [*_buttons(running=True), talk_html(talk.turns, pending=question or "")]

    def free(talk: Talk) -> list[Any]:
        # A request that was refused has left no turn, and must not look as if it waited.
        shown = talk_html(talk.turns) if talk.turns else _EMPTY
        return [*_buttons(running=False), shown]

    def forget(talk: Talk) -> str:
        compare.forget(talk)
        return _EMPTY

    asked = [
        parts.talk,
        session.model,
        parts.question,
        *parts.texts,
        *parts.generate.values(),
    ]
    buttons = [parts.ask, parts.stop]
    for trigger in (parts.ask.click, parts.question.submit):
        started = trigger(
            busy,
            [parts.talk, parts.question],
            [*buttons, parts.answers],
            queue=False,
            show_progress="hidden",
        )
        answered = started.then(
            run, asked, parts.answers, concurrency_id="compare", show_progress="minimal"
        )
        for end in (answered.success, answered.failure):  # "then" is not called after an error
            end(free, parts.talk, [*buttons, parts.answers], queue=False, show_progress="hidden")
    parts.stop.click(compare.stop, parts.talk, None, queue=False)
    parts.new.click(forget, parts.talk, parts.answers, queue=False)
    parts.answers.click(
        click, parts.talk, parts.answers, concurrency_id="compare", show_progress="hidden"
    )


def _connect_settings(session: Session, parts: _Parts) -> None:
    names = list(parts.generate)
    chosen = [
        parts.talk,
        session.model,
        parts.question,
        *parts.texts,
        *parts.generate.values(),
    ]
    changed = [
        session.model,
        parts.question,
        *(part for chooser in parts.methods for part in chooser.parts),
        *parts.generate.values(),
        *parts.view,
    ]

    def gathered(talk: Talk, model: str, question: str, *values: Any) -> Chosen:
        texts = _trimmed(values[:COLUMNS])
        generate = dict(zip(names, values[COLUMNS:], strict=True))
        found = Chosen(model, texts, question, talk.scene, generate)
        # What a link would not bring back is refused when it is made.
        from_json(found.as_json(), session.models.names, session.limits.new_tokens)
        return found

    @guarded
    def compact(*values: Any) -> str:
        return gathered(*values).as_json()

    @guarded
    def indented(*values: Any) -> str:
        return gathered(*values).as_json(indent=1) + "\n"

    def bring(talk: Talk, text: str) -> list[Any]:
        given = from_json(text, session.models.names, session.limits.new_tokens)
        view = [gr.skip()] * 4 if given.scene is None else _scene(talk, given.scene)
        return [
            given.model or gr.skip(),
            given.question,
            *choosers.set_all(given.methods, COLUMNS),
            *(given.generate[name] for name in names),
            *view,
        ]

    @guarded
    def load(talk: Talk, path: str) -> list[Any]:
        return bring(talk, Path(path).read_text("utf-8", errors="replace")[:100_000])

    @guarded
    def begin(talk: Talk, request: gr.Request) -> Iterator[list[Any]]:
        # A page without a picture says nothing to a newcomer: one is drawn at once.
        first = [gr.skip()] * (len(changed) - 4)
        text = request.query_params.get("settings")
        if text is None:
            yield [*first, *_scene(talk, _FIRST.scene)]
            return
        try:
            yield bring(talk, text)
        except Exception:
            yield [*first, *_scene(talk, _FIRST.scene)]
            raise

    for button, text, name in ((parts.link, compact, "link.js"), (parts.save, indented, "save.js")):
        button.click(text, chosen, parts.handed, queue=False).success(
            None, parts.handed, None, js=script(name)
        )
    parts.load.upload(
        load, [parts.talk, parts.load], changed, concurrency_limit=None, show_progress="hidden"
    )
    _page().load(begin, parts.talk, changed, concurrency_limit=None, show_progress="hidden")


def _page() -> gr.Blocks:
    """The page that is being built."""
    from gradio.context import Context

    return Context.root_block


def _scene(talk: Talk, number: float | None) -> list[Any]:
    """Updates of the picture's parts, with a drawn scene in view."""
    number = int(number or 0)
    truth = compare.show_scene(talk, number)
    return [talk.picture.image if talk.picture else None, number, truth, _EMPTY]


def _buttons(*, running: bool) -> list[Any]:
    return [gr.update(visible=not running), gr.update(visible=running)]


def _trimmed(texts: Sequence[str]) -> tuple[str, ...]:
    """Without the empty ones at the end."""
    kept = list(texts)
    while kept and not (kept[-1] or "").strip():
        kept.pop()
    return tuple(text or "" for text in kept)
