"""What the threads that ask one server know together: when to ask next, and when to stop."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmlm.chat_server.client import Answer

__all__ = ["Pace", "State"]


class State:
    """What all threads of a call know about the server: whether, and why, to stop asking.

    Attributes:
        reason: Why no further request is sent; "" while there is no such reason.
    """

    def __init__(self, give_up_after: int) -> None:
        self.reason = ""
        self._give_up_after = give_up_after
        self._in_a_row = 0
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def note(self, answer: Answer[Any]) -> None:
        """Draws the conclusions from an answer."""
        with self._lock:
            self._in_a_row = self._in_a_row + 1 if answer.silent else 0
            if answer.advice:
                self.stop(answer.reason)
            elif self._in_a_row >= self._give_up_after:
                self.stop(f"{self._in_a_row} requests in a row got no reply")

    def stop(self, reason: str) -> None:
        """No further requests; threads that wait wake up."""
        self.reason = self.reason or reason
        self._stopped.set()

    def wait(self, seconds: float) -> None:
        """Sleeps, but not longer than the call lasts."""
        self._stopped.wait(seconds)


class Pace:
    """Gives every request its turn, for all threads together."""

    def __init__(self, per_minute: float | None, now: Callable[[], float]) -> None:
        self._gap = 60 / per_minute if per_minute else 0.0
        self._now = now
        self._next = now()
        self._lock = threading.Lock()

    def turn(self) -> float:
        """Takes the next turn; gives the seconds until then."""
        with self._lock:
            now = self._now()
            start = max(now, self._next)
            self._next = start + self._gap
        return start - now

    def hold(self, seconds: float) -> None:
        """No request before so many seconds from now."""
        with self._lock:
            self._next = max(self._next, self._now() + seconds)
