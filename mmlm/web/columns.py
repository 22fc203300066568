"""One question, answered side by side: a column per set of methods, each on a twin of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from mmlm.decoding_settings import GenerateSettings
from mmlm.inputs import message, prepare

if TYPE_CHECKING:
    from PIL import Image

    from mmlm.engine.method import Method
    from mmlm.web.models import Models

__all__ = ["Column", "Past", "answer_all"]

_TICK = 0.06  # seconds between two looks at the columns; faster than people read


@dataclass(frozen=True)
class Past:
    """What was said before in one column.

    Attributes:
        question: Of the user.
        answer: Of this column.
    """

    question: str
    answer: str


@dataclass
class Column:
    """One way of answering, and its answer as far as it is.

    Attributes:
        methods: Attached while it answers; empty for the plain model.
        text: The answer so far.
        state: "waiting", "running", "done", "stopped" or "failed".
        n_tokens: New tokens; known when it is done.
        seconds: From the prompt to the last token, so far.
        error: What went wrong.
    """

    methods: tuple[Method, ...] = ()
    text: str = ""
    state: str = "waiting"
    n_tokens: int = 0
    seconds: float = 0.0
    error: Exception | None = None
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def label(self) -> str:
        """What it is called: the methods, or "plain"."""
        return " + ".join(method.label for method in self.methods) or "plain"


def answer_all(
    models: Models,
    name: str,
    columns: Sequence[Column],
    conversations: Sequence[tuple[Past, ...]],
    question: str,
    picture: Image.Image | None,
    settings: GenerateSettings,
) -> Iterator[None]:
    """Fills the columns, all at the same time; yields whenever one of them has changed.

    Sampled columns take turns: torch draws for all threads from one generator.

    Args:
        models: What can be borrowed.
        name: Which model.
        columns: Changed in place. Setting a column's `stop` ends it early.
        conversations: What was said before in each.
        question: Asked of all.
        picture: Shown with the first question of the conversation; None for a talk without one.
        settings: How to generate.
    """
    workers = 1 if settings.do_sample else len(columns)

    def run(column: Column, past: tuple[Past, ...]) -> None:
        try:
            _answer(models, name, column, past, question, picture, settings)
        except Exception as error:  # shown in its column; the others go on
            column.error, column.state = error, "failed"

    with ThreadPoolExecutor(max_workers=workers) as pool:
        running: list[Future[None]] = [
            pool.submit(run, column, past)
            for column, past in zip(columns, conversations, strict=True)
        ]
        try:
            seen: Any = None
            while not all(future.done() for future in running):
                now = [(column.state, column.text) for column in columns]
                if now != seen:
                    seen = now
                    yield
                time.sleep(_TICK)
        finally:
            # Also when nobody listens any more: the visitor closed the page.
            for column in columns:
                column.stop.set()
    yield


def _answer(
    models: Models,
    name: str,
    column: Column,
    past: tuple[Past, ...],
    question: str,
    picture: Image.Image | None,
    settings: GenerateSettings,
) -> None:
    from contextlib import nullcontext

    from mmlm.streaming import AnswerStream

    dice = models.dice if settings.do_sample else nullcontext()
    with models.borrow(name) as (model, processor), dice:
        column.state = "running"
        inputs = prepare(
            processor,
            [_messages(past, question, picture is not None)],
            [[picture] if picture is not None else []],
            device=model.device,
            dtype=model.dtype,
        )
        started = time.perf_counter()
        stream = AnswerStream(
            model, processor, inputs, column.methods, replace(settings, batch_size=1)
        )
        with stream as pieces:
            for _ in pieces:
                column.text = pieces.text
                column.seconds = time.perf_counter() - started
                if column.stop.is_set():
                    pieces.stop()
        column.text, column.n_tokens = pieces.text, pieces.n_tokens
        column.seconds = time.perf_counter() - started
        column.state = "stopped" if pieces.stopped else "done"


def _messages(past: tuple[Past, ...], question: str, shown: bool) -> list[dict[str, Any]]:
    """The conversation in chat format; the picture stands with the first question."""
    found = []
    for turn in past:
        found.append(message("user", turn.question, int(shown and not found)))
        found.append(message("assistant", turn.answer))
    return [*found, message("user", question, int(shown and not found))]
