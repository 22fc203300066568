"""A job: one request on its way through the model, and what its client gets from it."""

from __future__ import annotations

import asyncio
import contextlib
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeAlias

from mmlm.serve.refusals import Refusal

if TYPE_CHECKING:
    from mmlm.engine.method import Method
    from mmlm.serve.prompts import Prepared

__all__ = ["Answer", "Choosing", "Event", "Job"]


@dataclass(frozen=True)
class Choosing:
    """How the tokens of an answer are chosen, and where it ends.

    Attributes:
        temperature: 0 takes the most probable token.
        top_p: Tokens are drawn from the smallest set with this probability.
        seed: Seed of the draws.
        stops: Texts that end the answer.
        keeps_stop: Whether such a text is part of the answer.
        streams: Whether the client gets the answer piece by piece.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stops: tuple[str, ...] = ()
    keeps_stop: bool = False
    streams: bool = False


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: All of it.
        n_tokens: New tokens, the end token included.
        finish: ``stop`` (by itself, or at a stop sequence) or ``length``.
        stopped_by: The stop sequence that ended it.
    """

    text: str
    n_tokens: int
    finish: str
    stopped_by: str | None = None


Event: TypeAlias = str | Answer | Refusal
"""A piece of the answer; at last the whole answer, or why there is none."""


@dataclass(eq=False)
class Job:
    """What is asked, and the way back to who asked. Made on the event loop of the server.

    The model's thread calls `send`; everything else belongs to the event loop.

    Attributes:
        prompt: What the model is asked.
        methods: What is attached while it answers.
        choosing: How tokens are chosen.
        cancelled: Nobody waits for the answer any more; set once, read by the model's thread.
        sent: Pieces that were sent so far, joined. A job that has to be started again goes on from
            there.
    """

    prompt: Prepared
    methods: tuple[Method, ...]
    choosing: Choosing
    cancelled: bool = False
    sent: str = ""
    _loop: asyncio.AbstractEventLoop = field(default_factory=asyncio.get_running_loop)
    _events: asyncio.Queue[Event] = field(default_factory=asyncio.Queue)

    def send(self, event: Event) -> None:
        """Hands an event over to the event loop."""
        if isinstance(event, str):
            self.sent += event
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody is there any more
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    async def event(self) -> Event:
        """The next event."""
        return await self._events.get()
