"""One answer of `mmlm chat`: shown while it is written, stopped with Ctrl-C."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmlm.cli.chat_views import Written
    from mmlm.decoding_settings import GenerateSettings
    from mmlm.engine.method import Method
    from mmlm.show.conversation import Conversation

__all__ = ["Answer", "answer"]


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        text: The answer.
        n_tokens: New tokens, the end token included.
        stopped: Whether Ctrl-C ended it.
        seconds: From the question to the end.
    """

    text: str
    n_tokens: int
    stopped: bool
    seconds: float

    @property
    def remark(self) -> str:
        """Tokens and time, for people."""
        speed = f", {self.n_tokens / self.seconds:.3g} per second" if self.seconds else ""
        return f"{self.n_tokens} tokens in {self.seconds:.1f} s{speed}"


def answer(
    model: Any,
    processor: Any,
    talk: Conversation,
    methods: Sequence[Method],
    settings: GenerateSettings,
    shown: Written | None,
    *,
    patient: bool,
) -> Answer:
    """Answers the open turn of a conversation.

    Args:
        model: A Hugging Face LVLM.
        processor: Its processor.
        talk: The conversation.
        methods: Methods that are attached meanwhile.
        settings: How to generate.
        shown: Where the answer is written as it comes; None for nowhere.
        patient: Whether Ctrl-C only ever stops the answer; otherwise a second one is raised.

    Raises:
        MmlmError: If the model, a method or the processor cannot take the conversation.
    """
    from mmlm.streaming import AnswerStream

    began = time.monotonic()
    inputs = talk.inputs(model, processor)
    with (
        AnswerStream(model, processor, inputs, methods, settings) as pieces,
        _stopping(pieces.stop, patient),
    ):
        for piece in pieces:
            if shown:
                shown.add(piece)
        if shown:
            shown.end(" [stopped]" if pieces.stopped else "")
    seconds = round(time.monotonic() - began, 3)
    return Answer(pieces.text, pieces.n_tokens, pieces.stopped, seconds)


@contextlib.contextmanager
def _stopping(stop: Callable[[], None], patient: bool) -> Iterator[None]:
    """While an answer is written, Ctrl-C stops the answer and raises nothing.

    An exception could strike anywhere, also between the last token and its being noted.

    Args:
        stop: Ends the answer after the token that is being computed.
        patient: Ctrl-C again only explains that; otherwise it is raised.
    """
    if threading.current_thread() is not threading.main_thread():
        yield  # signals reach the main thread only, and only it may say what they do
        return
    presses = 0

    def pressed(number: int, frame: Any) -> None:
        nonlocal presses
        presses += 1
        stop()
        if presses > 1 and not patient:
            raise KeyboardInterrupt
        if presses > 1:
            # Not print: this may interrupt a print.
            os.write(2, b"\n(stops after the token that is being computed; Ctrl-\\ kills)\n")

    before = signal.signal(signal.SIGINT, pressed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
