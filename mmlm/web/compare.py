"""The compare tab: one picture, one question, up to four methods, side by side."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmlm.errors import InputError, MmlmError
from mmlm.show.conversation import Conversation, Picture
from mmlm.web.answers import Clicked, Turn, talk_html, truth_html
from mmlm.web.columns import Column, answer_all
from mmlm.web.gaze import Gaze, follow
from mmlm.web.gaze_figures import figures
from mmlm.web.method_forms import read_methods
from mmlm.web.settings import generate_settings
from mmlm.web.uploads import checked

if TYPE_CHECKING:
    from mmlm.engine.method import Method
    from mmlm.web.models import Session

__all__ = ["Talk", "ask", "forget", "show_scene", "show_upload", "stop", "word"]

_MOST_TURNS = 20


@dataclass(eq=False)
class Talk:
    """What one visitor has on the page; changed in place.

    Attributes:
        picture: In view; None for a talk without one.
        scene: Its number if it is a drawn scene.
        turns: The conversation about it.
        gazes: Answers that were followed: (turn, whose answer, whose methods) -> what was seen.
        warned: Words that the model does not know and the visitor was told of.
    """

    picture: Picture | None = None
    scene: int | None = None
    turns: list[Turn] = field(default_factory=list)
    gazes: dict[tuple[int, int, int], Gaze | MmlmError] = field(default_factory=dict)
    warned: set[str] = field(default_factory=set)

    def restart(self) -> None:
        """Forgets the conversation; the picture stays."""
        for turn in self.turns:
            for column in turn.columns:
                column.stop.set()
        self.turns.clear()
        self.gazes.clear()


def show_scene(talk: Talk, number: int) -> str:
    """Puts a drawn scene in view, and begins a new talk about it.

    Args:
        talk: Of the visitor.
        number: Of the scene.

    Returns:
        What is in it, as HTML.

    Raises:
        InputError: For a number below 0.
    """
    from mmlm.show.truth import draw_scene

    drawn = draw_scene(index=number)
    talk.restart()
    talk.scene = number
    talk.picture = Picture(f"scene {number}", drawn.image, known=drawn.known)
    return truth_html(drawn.known)


def show_upload(session: Session, talk: Talk, path: str | None) -> str:
    """Puts a visitor's file in view, and begins a new talk about it.

    Args:
        session: What the page shares.
        talk: Of the visitor.
        path: The file; None for no picture.

    Returns:
        What is in it, as HTML.

    Raises:
        ImageReadError: If it cannot be read safely; the talk is left without a picture.
    """
    from mmlm.show.truth import of_file

    talk.restart()
    talk.picture, talk.scene = None, None
    if path is None:
        return ""
    image = checked(path, session.limits)
    talk.picture = Picture(Path(path).name, image, path=Path(path), known=of_file(path))
    detector = session.detector.name if session.detector else ""
    return truth_html(talk.picture.known, detector=detector)


def ask(
    session: Session,
    talk: Talk,
    model: str,
    question: str,
    texts: tuple[str, ...],
    generate: dict[str, Any],
) -> Iterator[str]:
    """Asks all columns, and gives the talk as HTML whenever it has grown.

    Args:
        session: What the page shares.
        talk: Of the visitor.
        model: Its name.
        question: As the visitor wrote it.
        texts: Methods by column, as text; empty ones are not used.
        generate: Generation settings by name.

    Raises:
        InputError: If anything of that cannot be; nothing was done then.
    """
    question = (question or "").strip()
    if not question:
        raise InputError("There is no question.", advice="Write one, e.g. describe the image .")
    if len(talk.turns) >= _MOST_TURNS:
        raise InputError(
            f"This talk has {_MOST_TURNS} questions already.", advice="Begin a new talk."
        )
    settings = generate_settings(generate, session.limits.new_tokens)
    chosen = [(), *filter(None, map(_column_methods, texts, range(1, len(texts) + 1)))]
    _warn_unknown(session, talk, model, question)
    columns = [Column(_asked(talk, methods, question), methods) for methods in chosen]
    turn = Turn(question, columns, model)
    if talk.picture is not None and talk.picture.known is not None:
        turn.known = dict.fromkeys(range(len(columns)), talk.picture.known)
    for earlier in talk.turns:
        earlier.clicked, earlier.figures = None, {}
    talk.turns.append(turn)
    for _ in answer_all(session.models, model, columns, settings):
        yield talk_html(talk.turns)
    if _judge(session, turn):
        yield talk_html(talk.turns)


def stop(talk: Talk) -> None:
    """Ends the answers of the last question after the token that is being computed."""
    for column in talk.turns[-1].columns if talk.turns else ():
        column.stop.set()


def forget(talk: Talk) -> str:
    """Begins a new talk about the same picture."""
    talk.restart()
    return ""


def word(session: Session, talk: Talk, turn: int, clicked: Clicked) -> Iterator[str]:
    """Shows where each column looked at a word of one of the answers.

    Args:
        session: What the page shares.
        talk: Of the visitor.
        turn: Number of the question.
        clicked: Which word of whose answer.

    Raises:
        InputError: If there is no such word, or no picture.
    """
    if not 0 <= turn < len(talk.turns) or not 0 <= clicked.column < len(talk.turns[turn].columns):
        raise InputError("This answer is gone.", advice="Ask again, then click a word.")
    asked = talk.turns[turn]
    source = asked.columns[clicked.column]
    if source.state not in ("done", "stopped"):
        raise InputError("This answer is not finished.", advice="Wait for its end, then click.")
    for other in talk.turns:
        other.clicked, other.figures = None, {}
    asked.clicked = clicked
    # Maps are large: those of the question in view are kept.
    talk.gazes = {key: gaze for key, gaze in talk.gazes.items() if key[0] == turn}
    missing = [
        place
        for place in range(len(asked.columns))
        if (turn, clicked.column, place) not in talk.gazes
    ]
    if missing:
        asked.figures = dict.fromkeys(range(len(asked.columns)), '<p class="looking">looking …</p>')
        yield talk_html(talk.turns)

    def seen(place: int) -> Gaze | MmlmError:
        try:
            with session.models.borrow(asked.model) as (model, processor):
                methods = asked.columns[place].methods
                return follow(model, processor, methods, source.asked, source.token_ids)
        except MmlmError as error:
            return error

    with ThreadPoolExecutor(max_workers=len(asked.columns)) as pool:
        for place, gaze in zip(missing, pool.map(seen, missing), strict=True):
            talk.gazes[turn, clicked.column, place] = gaze
    gazes = [talk.gazes[turn, clicked.column, place] for place in range(len(asked.columns))]
    picture = next(iter(source.asked.pictures()), None)
    asked.figures = figures(gazes, clicked, picture)
    yield talk_html(talk.turns)


def _column_methods(text: str, place: int) -> tuple[Method, ...]:
    try:
        return read_methods(text)
    except MmlmError as error:
        raise InputError(f"Method {place}: {error}", advice=error.advice) from error


def _asked(talk: Talk, methods: tuple[Method, ...], question: str) -> Conversation:
    """The question, behind what these methods said before.

    Methods that were not there before go on from what the plain model said.
    """
    if not talk.turns:
        pictures = () if talk.picture is None else (talk.picture,)
        return Conversation(pending=pictures).with_question(question)
    columns = talk.turns[-1].columns
    same = [column for column in columns if column.methods == methods]
    return (same or columns)[0].answered.with_question(question)


def _warn_unknown(session: Session, talk: Talk, model: str, question: str) -> None:
    """Tells, once per talk and word, which words the model cannot read."""
    from mmlm.inputs import unknown_words

    unknown = [
        name
        for name in unknown_words(session.models.open(model).processor, question)
        if name not in talk.warned
    ]
    talk.warned.update(unknown)
    if unknown:
        gr.Warning(
            f"The model has no word for {', '.join(unknown)}; it reads them all as one unknown "
            "word. The embedded model knows words of its own small world only.",
            title="Unknown words",
        )


def _judge(session: Session, turn: Turn) -> bool:
    """Asks the detector about the objects that the answers name; whether it said anything."""
    from mmlm.show.truth import by_detector

    # Of the question: another picture may be in view by now.
    picture = next(iter(turn.columns[0].asked.shown), None)
    if session.detector is None or picture is None or picture.path is None or turn.known:
        return False
    for place, column in enumerate(turn.columns):
        if column.text:
            turn.known[place] = by_detector(session.detector, picture.path, column.text)
    return bool(turn.known)
