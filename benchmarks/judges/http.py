"""A judge behind HTTP: any server that speaks OpenAI's chat completions, a local one included.

Servers fail in many ways, and each has its own right answer. What may pass (5xx, 429, time-outs,
cut or unreadable bodies, lost connections) is tried again with growing waits; what concerns one
prompt (HTTP 400, a reply cut off at the token limit, a refusal) fails that prompt; what concerns
everything (a wrong key or address) stops the run with advice. If several prompts in a row get no
reply, the rest is not asked, so that a dead server costs minutes and not days.
"""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from benchmarks.judges import Judge, JudgePrompt, Verdict
from benchmarks.judges.wire import (
    OPENAI,
    Passing,
    Refused,
    check_status,
    checked_key,
    checked_url,
    read_reply,
)
from mmlm.errors import InputError

if TYPE_CHECKING:
    import httpx

__all__ = ["OPENAI", "ChatJudge", "Patience"]

LARGEST_BODY = 16 * 2**20  # bytes; a judge's reply is a few kilobytes


@dataclass(frozen=True)
class Patience:
    """How hard a server is tried.

    The defaults are ours; the official scripts try 100 times with waits of 10 s and more.

    Attributes:
        timeout: Longest time for one try, from connecting to the last byte, in seconds.
        retries: How often a prompt is tried again.
        first_wait: Wait before the first retry in seconds; doubled each time, with jitter.
        longest_wait: Longest wait in seconds. A server that asks for more is not tried again.
        give_up_after: After so many prompts in a row without reply the rest is not asked.
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
        patience: Patience = Patience(),
        sleep: Callable[[float], object] | None = None,
        now: Callable[[], float] = time.monotonic,
        jitter: Callable[[], float] = random.random,
    ) -> None:
        self.model = model
        self.parameters: dict[str, Any] = dict(parameters or {})
        self.url = checked_url(base_url)
        self._key = checked_key(key)
        self._patience = patience
        self._sleep = sleep
        self._now = now
        self._jitter = jitter

    def verdicts(self, prompts: Sequence[JudgePrompt]) -> Iterator[Verdict]:
        """Asks with bounded concurrency; gives verdicts as they arrive.

        Raises:
            InputError: If the server refuses everything (key, address) and gave no reply at all.
        """
        state = _State(self._patience.give_up_after)
        pace = _Pace(self._patience.per_minute, self._now, self._sleep or state.wait)
        with (
            self._client() as client,
            ThreadPoolExecutor(self._patience.concurrency, "judge") as pool,
        ):
            try:
                asked = [pool.submit(self._one, client, pace, state, p) for p in prompts]
                yield from (future.result() for future in as_completed(asked))
            finally:  # also when the consumer stops early: no further request
                state.stop("the run was stopped")
        if state.hopeless and not state.replied:
            raise InputError(
                f"The judge {self.model} at {self.url} refuses: {state.hopeless.verdict.reason}.",
                advice=state.hopeless.advice,
            )

    def _one(
        self, client: httpx.Client, pace: _Pace, state: _State, prompt: JudgePrompt
    ) -> Verdict:
        outcome = self._outcome(client, pace, state, prompt)
        # Noted here and not by the consumer: the thread must know before it takes its next prompt.
        state.note(outcome)
        return outcome.verdict

    def _outcome(
        self, client: httpx.Client, pace: _Pace, state: _State, prompt: JudgePrompt
    ) -> _Outcome:
        """Asks one prompt until there is a reply, a refusal, or no patience left."""
        body = self.parameters | {"model": self.model, "messages": prompt.messages}
        content = json.dumps(body).encode("ascii")
        reason = ""
        for number in range(self._patience.retries + 1):
            pace.turn()
            if state.reason:
                return _Outcome(Verdict.failed(prompt.id, f"not asked: {state.reason}"))
            try:
                return _Outcome(Verdict(prompt.id, self._post(client, content)))
            except Refused as refusal:
                reason = self._without_key(refusal.reason)
                return _Outcome(Verdict.failed(prompt.id, reason), refusal.silent, refusal.advice)
            except Passing as trouble:
                reason, asked = self._without_key(trouble.reason), trouble.wait
            if asked is None:
                if number < self._patience.retries:
                    pace.sleep(self._wait(number))
            elif asked <= self._patience.longest_wait:
                pace.hold(asked)  # all threads have the same server
            else:
                reason = f"{reason}; it asks to wait {asked:.0f} s"
                break
        return _Outcome(Verdict.failed(prompt.id, reason), silent=True)

    def _wait(self, number: int) -> float:
        full: float = min(self._patience.longest_wait, self._patience.first_wait * 2**number)
        return full * (0.5 + self._jitter() / 2)

    def _post(self, client: httpx.Client, content: bytes) -> str:
        import httpx

        deadline = self._now() + self._patience.timeout
        body = bytearray()
        try:
            with client.stream("POST", self.url, content=content) as response:
                for chunk in response.iter_bytes():
                    body += chunk
                    if self._now() > deadline:
                        raise Passing(f"no answer within {self._patience.timeout:g} s")
                    if len(body) > LARGEST_BODY:
                        raise Passing("an endless answer")
        except httpx.TimeoutException as error:
            raise Passing(f"no answer within {self._patience.timeout:g} s") from error
        except httpx.RequestError as error:
            raise Passing(f"no connection, or a lost one ({type(error).__name__})") from error
        check_status(response.status_code, response.headers, bytes(body))
        return read_reply(bytes(body))

    def _client(self) -> httpx.Client:
        import httpx

        # Unpacked, so that the deadline is looked at with every byte that arrives.
        headers = {"Content-Type": "application/json", "Accept-Encoding": "identity"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        return httpx.Client(
            headers=headers,
            timeout=self._patience.timeout,
            # A proxy never leads to this machine. Redirects are not followed: the key goes to
            # the server that was named and to no other.
            trust_env=urlsplit(self.url).hostname not in ("localhost", "127.0.0.1", "::1"),
            follow_redirects=False,
        )

    def _without_key(self, text: str) -> str:
        return text.replace(self._key, "***") if self._key else text


@dataclass(frozen=True)
class _Outcome:
    """A verdict, and what it says about the server.

    Attributes:
        verdict: For the caller.
        silent: The server gave nothing that shows it works.
        advice: Set if no other prompt can succeed.
    """

    verdict: Verdict
    silent: bool = False
    advice: str = ""


class _State:
    """What all threads of a run know about the server: whether, and why, to stop asking.

    Attributes:
        reason: Why no further request is sent; "" while there is no such reason.
        replied: Whether there was any reply.
        hopeless: The first outcome that says that no prompt can succeed.
    """

    def __init__(self, give_up_after: int) -> None:
        self.reason = ""
        self.replied = False
        self.hopeless: _Outcome | None = None
        self._give_up_after = give_up_after
        self._in_a_row = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def note(self, outcome: _Outcome) -> None:
        """Draws the conclusions from an outcome."""
        with self._lock:
            self.replied |= outcome.verdict.reply is not None
            self._in_a_row = self._in_a_row + 1 if outcome.silent else 0
            if outcome.advice:
                self.hopeless = self.hopeless or outcome
                self.stop(outcome.verdict.reason)
            elif self._in_a_row >= self._give_up_after:
                self.stop(f"{self._in_a_row} prompts in a row got no reply")

    def stop(self, reason: str) -> None:
        """No further requests; threads that wait wake up."""
        self.reason = self.reason or reason
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Sleeps, but not longer than the run lasts."""
        self._stopped.wait(seconds)


class _Pace:
    """Gives every request its turn, for all threads together."""

    def __init__(
        self,
        per_minute: float | None,
        now: Callable[[], float],
        sleep: Callable[[float], object],
    ) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._now = now
        self.sleep = sleep
        self._next = now()
        self._lock = threading.Lock()

    def turn(self) -> None:
        """Waits until a request may be sent."""
        with self._lock:
            now = self._now()
            start = max(now, self._next)
            self._next = start + self._gap
        if start > now:
            self.sleep(start - now)

    def hold(self, seconds: float) -> None:
        """No request before so many seconds from now."""
        with self._lock:
            self._next = max(self._next, self._now() + seconds)
