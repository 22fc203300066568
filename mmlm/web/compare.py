"""The compare tab: one picture, one question, up to four methods, side by side."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmlm.decoding_settings import GenerateSettings
from mmlm.errors import InputError
from mmlm.images import load_image
from mmlm.web.answers import Turn, talk_html, truth_html
from mmlm.web.columns import Column, Past, answer_all
from mmlm.web.messages import guarded
from mmlm.web.method_forms import read_methods

if TYPE_CHECKING:
    from mmlm.show.truth import Known
    from mmlm.web.models import Session

__all__ = ["Talk", "build"]


@dataclass
class Talk:
    """What one visitor has on the page.

    Attributes:
        picture: File of the picture in view; empty for none.
        known: What is known to be in it.
        turns: The conversation about it.
    """

    picture: str = ""
    known: Known | None = None
    turns: list[Turn] = field(default_factory=list)


#: The first question; made of words that the embedded model knows.
FIRST_QUESTION = "describe the image ."
_LONGEST_QUESTION = 4000


def build(session: Session) -> tuple[gr.Textbox, ...]:
    """Lays out the tab and connects it.

    Args:
        session: What the tabs share.

    Returns:
        The fields with the methods of each column as text.
    """
    from mmlm.web.choosers import chooser

    talk = gr.State(Talk())
    with gr.Row(elem_classes="compare"):
        with gr.Column(scale=0, min_width=320, elem_classes="side"):
            picture = gr.Image(
                label="Picture",
                format="png",
                type="filepath",
                sources=["upload", "clipboard"],
                buttons=["fullscreen"],
                height=300,
                elem_id="picture",
                placeholder="Drop a picture here\nor click to choose one",
            )
            # Gradio would open the file and fail with its own words. (A subclass is no way: Gradio
            # writes a .pyi file beside the module of every subclass.)
            picture.preprocess = _path
            truth = gr.HTML(truth_html(None), elem_id="truth")
            with gr.Row(elem_classes="tight"):
                draw = gr.Button("Draw a scene", elem_id="draw", size="sm", min_width=120)
                number = gr.Number(
                    17,
                    label="Scene",
                    show_label=False,
                    precision=0,
                    minimum=0,
                    elem_id="scene-number",
                    min_width=90,
                )
            methods = tuple(chooser(place, session.model) for place in range(1, 5))
        with gr.Column(scale=1, min_width=320):
            with gr.Row(elem_classes="tight bar"):
                question = gr.Textbox(
                    FIRST_QUESTION,
                    label="Question",
                    show_label=False,
                    placeholder="Ask about the picture",
                    max_length=_LONGEST_QUESTION,
                    elem_id="question",
                    scale=1,
                )
                ask = gr.Button("Ask", variant="primary", elem_id="ask", scale=0, min_width=90)
                stop = gr.Button(
                    "Stop", variant="stop", elem_id="stop", scale=0, min_width=90, visible=False
                )
                new = gr.Button("New talk", elem_id="new-talk", scale=0, min_width=100)
            answers = gr.HTML("", elem_id="answers")
    asked = [talk, session.model, question, *methods]
    busy = {"fn": lambda: _buttons(running=True), "outputs": [ask, stop], "queue": False}
    free = {"fn": lambda: _buttons(running=False), "outputs": [ask, stop], "queue": False}

    @guarded
    def run(talk: Talk, model: str, question: str, *texts: str) -> Iterator[str]:
        yield from _run(session, talk, model, question, texts)

    @guarded
    def show(talk: Talk, number: float) -> tuple[Any, ...]:
        return _show_scene(talk, int(number or 0))

    @guarded
    def take(talk: Talk, path: str | None) -> tuple[Any, ...]:
        return _take(session, talk, path)

    shown = [picture, truth, answers]
    page = gr.context.Context.root_block
    for trigger in (ask.click, question.submit):
        running = trigger(**busy).then(
            run, asked, answers, concurrency_id="compare", show_progress="hidden"
        )
        running.then(**free)
    stop.click(_stop, talk, queue=False)
    draw.click(lambda: random.randrange(100_000), None, number).then(show, [talk, number], shown)
    number.submit(show, [talk, number], shown)
    picture.upload(take, [talk, picture], shown)
    picture.clear(take, [talk, picture], shown)
    new.click(_forget, talk, answers, queue=False)
    page.load(show, [talk, number], shown)
    return methods


def _path(payload: Any) -> str | None:
    """The file that a visitor gave, unread."""
    return payload.path if payload is not None else None


def _buttons(*, running: bool) -> tuple[Any, Any]:
    return gr.update(visible=not running), gr.update(visible=running)


def _run(
    session: Session, talk: Talk, model: str, question: str, texts: tuple[str, ...]
) -> Iterator[str]:
    question = (question or "").strip()
    if not question:
        raise InputError("There is no question.", advice="Write one, e.g. describe the image .")
    chosen = [methods for methods in map(read_methods, texts) if methods]
    columns = [Column(), *map(Column, chosen)]
    turn = Turn(question, columns)
    if talk.known is not None:
        turn.known = dict.fromkeys(range(len(columns)), talk.known)
    pasts = [_past(talk.turns, column) for column in columns]
    talk.turns.append(turn)
    settings = GenerateSettings(max_new_tokens=128)
    image = load_image(talk.picture) if talk.picture else None
    for _ in answer_all(session.models, model, columns, pasts, question, image, settings):
        yield talk_html(talk.turns)


def _past(turns: list[Turn], column: Column) -> tuple[Past, ...]:
    """What these methods said before; where they are new, what the plain model said."""
    found = []
    for turn in turns:
        same = [one for one in turn.columns if one.methods == column.methods]
        found.append(Past(turn.question, (same or turn.columns)[0].text))
    return tuple(found)


def _stop(talk: Talk) -> None:
    for column in talk.turns[-1].columns if talk.turns else ():
        column.stop.set()


def _forget(talk: Talk) -> str:
    talk.turns.clear()
    return ""


def _show_scene(talk: Talk, number: int) -> tuple[Any, ...]:
    from mmlm.show.truth import draw_scene

    drawn = draw_scene(index=number)
    path = Path(mkdtemp(prefix="mmlm-scene-")) / f"scene-{number}.png"
    drawn.image.save(path)
    talk.picture, talk.known = str(path), drawn.known
    talk.turns.clear()
    return str(path), truth_html(talk.known), ""


def _take(session: Session, talk: Talk, path: str | None) -> tuple[Any, ...]:
    from mmlm.show.truth import of_file

    if path is not None:
        load_image(path, session.limits.pixels)
    talk.picture, talk.known = path or "", of_file(path) if path else None
    talk.turns.clear()
    return gr.skip(), truth_html(talk.known), ""
