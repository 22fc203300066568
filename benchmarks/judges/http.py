"""A judge behind HTTP: any server that speaks OpenAI's chat completions, a local one included.

What to do about a server in trouble is `mmlm.chat_server.client`'s business; here stands what a
reply is to a judge: text that is whole and not empty.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks.judges import Judge, JudgePrompt, Verdict
from mmlm.chat_server.client import PATIENCE, Answer, ChatServer, Patience
from mmlm.chat_server.wire import OPENAI, Passing, Refused, read_choices
from mmlm.errors import InputError

__all__ = ["OPENAI", "ChatJudge", "Patience"]


class ChatJudge(Judge):
    """A chat model behind ``POST <base_url>/chat/completions``.

    Args:
        model: Name of the model on the server, e.g. "gpt-4-0314".
        base_url: Address up to and including ``/v1``.
        key: API key; sent to the server, and never stored or shown.
        parameters: Further fields of the request, e.g. {"temperature": 0, "max_tokens": 1024}:
            all that determines a reply, hence part of the judge's name.
        patience: How hard the server is tried.
        sleep: Replaces waiting, for tests.
        now: Replaces the clock (seconds), for tests.
        jitter: A random number in [0, 1), for tests.

    Raises:
        InputError: If the address or the key cannot be right.
    """

    def __init__(
        self,
        model: str,
        base_url: str = OPENAI,
        *,
        key: str | None = None,
        parameters: Mapping[str, Any] | None = None,
        patience: Patience = PATIENCE,
        sleep: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.model = model
        self.parameters: dict[str, Any] = dict(parameters or {})
        self._server = ChatServer(
            base_url, key=key, patience=patience, sleep=sleep, now=now, jitter=jitter
        )

    @property
    def url(self) -> str:
        """Where the prompts are sent."""
        return self._server.url

    def verdicts(self, prompts: Sequence[JudgePrompt]) -> Iterator[Verdict]:
        """Asks with bounded concurrency; gives verdicts as they arrive.

        Raises:
            InputError: If the server refuses everything (key, address) and gave no reply at all.
        """
        bodies = [
            self.parameters | {"model": self.model, "messages": prompt.messages}
            for prompt in prompts
        ]
        replied = False
        hopeless: Answer[str] | None = None
        for answer in self._server.answers(bodies, read_reply):
            identifier = prompts[answer.index].id
            if answer.value is not None:
                replied = True
                yield Verdict(identifier, answer.value)
            else:
                if answer.advice:
                    hopeless = hopeless or answer
                yield Verdict.failed(identifier, answer.reason)
        if hopeless and not replied:
            raise InputError(
                f"The judge {self.model} at {self.url} refuses: {hopeless.reason}.",
                advice=hopeless.advice,
            )


def read_reply(body: bytes) -> str:
    """The text of a chat completion.

    Raises:
        Passing: If the body is not what the interface promises.
        Refused: If it is, and holds no whole reply.
    """
    choice = read_choices(body)[0]
    if choice.finish == "length":
        raise Refused("the reply was cut off at the token limit")
    if choice.refused:
        raise Refused("the judge refused to reply")
    if choice.text is None:
        raise Passing("an answer whose content is no text")
    if not choice.text.strip():
        raise Passing("an empty reply")
    return choice.text
