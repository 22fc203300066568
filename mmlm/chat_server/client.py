"""Many requests to one server, whatever state it is in.

Servers fail in many ways, and each has its own right answer. What may pass (5xx, 429, time-outs,
cut or unreadable bodies, lost connections) is tried again with growing waits; what concerns one
request (HTTP 400) fails that request; what concerns everything (a wrong key or address) ends the
asking. If several requests in a row get no reply, the rest is not asked, so that a dead server
costs minutes and not days.
"""

from __future__ import annotations

import contextlib
import functools
import json
import random
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Generic, TypeVar
from urllib.parse import urlsplit

from mmlm.chat_server.turns import Pace, State
from mmlm.chat_server.wire import (
    OPENAI,
    Passing,
    Refused,
    check_status,
    checked_key,
    checked_url,
)

if TYPE_CHECKING:
    import ssl

    import httpx

__all__ = ["PATIENCE", "Answer", "ChatServer", "Patience"]

LARGEST_BODY = 16 * 2**20  # bytes; a reply is a few kilobytes

T = TypeVar("T")


@dataclass(frozen=True)
class Patience:
    """How hard a server is tried.

    The defaults are ours; official scripts try 100 times with waits of 10 s and more.

    Attributes:
        timeout: Longest time for one try, from connecting to the last byte, in seconds.
        retries: How often a request is tried again.
        first_wait: Wait before the first retry in seconds; doubled each time, with jitter.
        longest_wait: Longest wait in seconds. A server that asks for more is not tried again.
        give_up_after: After so many requests in a row without reply the rest is not asked.
        concurrency: Requests under way at the same time.
        per_minute: Most requests in a minute, retries included; None for no limit.
    """

    timeout: float = 60.0
    retries: int = 5
    first_wait: float = 1.0
    longest_wait: float = 120.0
    give_up_after: int = 5
    concurrency: int = 4
    per_minute: float | None = None

    def __post_init__(self) -> None:
        positive = ("timeout", "first_wait", "longest_wait", "give_up_after", "concurrency")
        for name in positive:
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be positive, got {getattr(self, name)!r}.")
        if self.retries < 0:
            raise ValueError(f"retries must be 0 or more, got {self.retries!r}.")
        if self.per_minute is not None and not 0 < self.per_minute < float("inf"):
            raise ValueError(f"per_minute must be positive, got {self.per_minute!r}.")


PATIENCE = Patience()


@dataclass(frozen=True)
class Answer(Generic[T]):
    """What came of one request, and what that says about the server.

    Attributes:
        index: Place of the request among those that were asked together.
        value: What was read from the server's answer; None if there is none.
        reason: Why there is none.
        silent: The server gave nothing that shows it works.
        passing: Patience ran out on trouble that may pass: it says nothing about the request.
        asked: Whether the server was asked at all; it is not once there is no hope for it.
        advice: Set if no other request can succeed.
    """

    index: int
    value: T | None
    reason: str = ""
    silent: bool = False
    advice: str = ""
    passing: bool = False
    asked: bool = True


class ChatServer:
    """A server behind ``POST <base_url>/chat/completions``.

    Args:
        base_url: Address up to and including ``/v1``.
        key: API key; sent to the server, and never stored or shown.
        patience: How hard the server is tried.
        sleep: Replaces waiting, for tests.
        now: Replaces the clock (seconds), for tests.
        jitter: A random number in [0, 1), for tests.

    Attributes:
        url: Where requests are sent.
        patience: As given.

    Raises:
        InputError: If the address or the key cannot be right.
    """

    def __init__(
        self,
        base_url: str = OPENAI,
        *,
        key: str | None = None,
        patience: Patience = PATIENCE,
        sleep: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.url = checked_url(base_url)
        self.patience = patience
        self._key = checked_key(key)
        self._sleep = sleep
        self._now = now
        self._jitter = jitter
        self._pace = Pace(patience.per_minute, now)

    def answers(
        self, bodies: Sequence[Mapping[str, Any]], read: Callable[[bytes], T]
    ) -> Generator[Answer[T], None, None]:
        """Asks with bounded concurrency.

        Args:
            bodies: The requests, as JSON values.
            read: Reads the body of a successful answer; raises `Passing` if another try may bring
                a better one, `Refused` if not.

        Yields:
            One answer per request, as they arrive. Closing the generator stops the asking.
        """
        state = State(self.patience.give_up_after)
        with (
            self._client() as client,
            ThreadPoolExecutor(self.patience.concurrency, "chat") as pool,
        ):

            def one(index: int) -> Answer[T]:
                answer = self._answer(client, state, index, bodies[index], read)
                # Noted here and not by the consumer: the thread must know before its next request.
                state.note(answer)
                return answer

            try:
                asked = [pool.submit(one, index) for index in range(len(bodies))]
                yield from (future.result() for future in as_completed(asked))
            finally:  # also when the consumer stops early: no further request
                state.stop("the run was stopped")

    def answer(self, body: Mapping[str, Any], read: Callable[[bytes], T]) -> Answer[T]:
        """Asks one thing; see `answers`."""
        with contextlib.closing(self.answers([body], read)) as answers:
            return next(answers)

    def _answer(
        self,
        client: httpx.Client,
        state: State,
        index: int,
        body: Mapping[str, Any],
        read: Callable[[bytes], T],
    ) -> Answer[T]:
        """Asks until there is a reply, a refusal, or no patience left."""
        content = json.dumps(body).encode("ascii")
        sleep = self._sleep or state.wait
        reason = ""
        for number in range(self.patience.retries + 1):
            if (seconds := self._pace.turn()) > 0:
                sleep(seconds)
            if state.reason:
                return Answer(index, None, f"not asked: {state.reason}", asked=False)
            try:
                return Answer(index, read(self._post(client, content)))
            except Refused as refusal:
                reason = self._without_key(refusal.reason)
                return Answer(index, None, reason, refusal.silent, refusal.advice)
            except Passing as trouble:
                reason, asked = self._without_key(trouble.reason), trouble.wait
            if asked is None:
                if number < self.patience.retries:
                    sleep(self._wait(number))
            elif asked <= self.patience.longest_wait:
                self._pace.hold(asked)  # all threads have the same server
            else:
                reason = f"{reason}; it asks to wait {asked:.0f} s"
                break
        return Answer(index, None, reason, silent=True, passing=True)

    def _wait(self, number: int) -> float:
        full: float = min(self.patience.longest_wait, self.patience.first_wait * 2**number)
        return full * (0.5 + self._jitter() / 2)

    def _post(self, client: httpx.Client, content: bytes) -> bytes:
        import httpx

        deadline = self._now() + self.patience.timeout
        body = bytearray()
        try:
            with client.stream("POST", self.url, content=content) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if self._now() > deadline:
                        raise Passing(f"no answer within {self.patience.timeout:g} s")
                    if len(body) > LARGEST_BODY:
                        raise Passing("an endless answer")
        except httpx.TimeoutException as error:
            raise Passing(f"no answer within {self.patience.timeout:g} s") from error
        except httpx.RequestError as error:
            raise Passing(f"no connection, or a lost one ({type(error).__name__})") from error
        check_status(response.status_code, response.headers, bytes(body))
        return bytes(body)

    def _client(self) -> httpx.Client:
        import httpx

        # Unpacked, so that the deadline is looked at with every byte that arrives.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx.Client(
            headers=headers,
            timeout=self.patience.timeout,
            verify=_tls(),
            # A proxy never leads to this machine. Redirects are not followed: the key goes to
            # the server that was named and to no other.
            trust_env=urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1"),
            follow_redirects=False,
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


@functools.cache
def _tls() -> ssl.SSLContext:
    """Certificates, read once: it takes longer than a request to a server nearby."""
    import httpx

    return httpx.create_ssl_context()
