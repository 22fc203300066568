"""One question, answered side by side: a column per set of methods, each on a twin of its own."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError

if TYPE_CHECKING:
    import torch

    from mmlm.decoding_settings import GenerateSettings
    from mmlm.engine.method import Method
    from mmlm.show.conversation import Conversation
    from mmlm.web.models import Models

__all__ = ["Column", "answer_all"]

_TICK = 0.06  # seconds between two looks at the columns; people read slower


@dataclass(eq=False)
class Column:
    """One way of answering, and its answer as far as it is.

    Attributes:
        asked: The conversation, whose last question is open.
        methods: Attached while it answers; empty for the plain model.
        text: The answer so far.
        state: Where it is.
        token_ids: Of the answer; known when it is done.
        seconds: From the ready prompt to the last token, so far.
        error: What went wrong.
        stop: Set it to end the answer early.
    """

    asked: Conversation
    methods: tuple[Method, ...] = ()
    text: str = ""
    state: Literal["waiting", "running", "done", "stopped", "failed"] = "waiting"
    token_ids: tuple[int, ...] = ()
    seconds: float = 0.0
    error: Exception | None = None
    stop: threading.Event = field(default_factory=threading.Event, repr=False)

    @property
    def label(self) -> str:
        """What it is called: its methods, or "plain"."""
        return " + ".join(method.label for method in self.methods) or "plain"

    @property
    def answered(self) -> Conversation:
        """The conversation with the answer, to be continued."""
        texts = [method.text for method in self.methods]
        return self.asked.with_answer(self.text, texts)


def answer_all(
    models: Models, name: str, columns: Sequence[Column], settings: GenerateSettings
) -> Iterator[None]:
    """Fills the columns, all at the same time; yields whenever one of them has changed.

    Sampled columns take turns: torch draws for all threads from one generator. An error stays in
    its column, and the others go on. If the caller stops reading, the columns are stopped.

    Args:
        models: What can be borrowed.
        name: Which model.
        columns: Changed in place.
        settings: How to generate.
    """

    def run(column: Column) -> None:
        try:
            _answer(models, name, column, settings)
        except Exception as error:
            column.error, column.state = error, "failed"

    with ThreadPoolExecutor(max_workers=1 if settings.do_sample else len(columns)) as pool:
        running: list[Future[None]] = [pool.submit(run, column) for column in columns]
        seen: Any = None
        try:
            while not all(future.done() for future in running):
                now = [(column.state, column.text) for column in columns]
                if now != seen:
                    seen = now
                    yield
                time.sleep(_TICK)
        finally:
            for column in columns:
                column.stop.set()
    yield


def _answer(models: Models, name: str, column: Column, settings: GenerateSettings) -> None:
    from mmlm.streaming import AnswerStream

    dice = models.dice if settings.do_sample else nullcontext()
    with models.borrow(name) as (model, processor), dice:
        if column.stop.is_set():
            column.state = "stopped"
            return
        column.state = "running"
        inputs = column.asked.inputs(model, processor)
        room = _room(model, inputs)
        settings = replace(settings, max_new_tokens=min(settings.max_new_tokens, room))
        started = time.perf_counter()
        with AnswerStream(model, processor, inputs, column.methods, settings) as pieces:
            for _ in pieces:
                column.text = pieces.text
                column.seconds = time.perf_counter() - started
                if column.stop.is_set():
                    pieces.stop()
        column.seconds = time.perf_counter() - started
        column.text, column.token_ids = pieces.text, pieces.token_ids
        column.state = "stopped" if pieces.stopped else "done"


def _room(model: Any, inputs: dict[str, torch.Tensor]) -> int:
    """How many new tokens the model can write behind a prompt before its positions end."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    length = inputs["input_ids"].shape[1]
    if most is None:
        return sys.maxsize
    if length >= most:
        raise InputError(
            f"The talk has grown to {length} tokens, and this model reads {most}.",
            advice="Begin a new talk.",
        )
    return most - length
