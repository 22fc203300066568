"""What a client is told when there is no answer: an HTTP status and OpenAI's error object."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mmlm.errors import MmlmError

__all__ = ["Refusal", "failed", "invalid", "too_many", "unfit"]

_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class Refusal(Exception):  # noqa: N818  (an answer of ours, not an error of ours)
    """Ends a request; the client gets the status and the message.

    Args:
        status: The HTTP status: 4xx for what the client can change, 5xx for the rest.
        message: What was given, what is allowed, what to do. Never holds what another client sent.
        param: The field of the request that is meant, e.g. ``messages.0.content``.
        code: A word for programs, OpenAI's where there is one.
        headers: Further headers of the response, e.g. ``Retry-After``.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.param = param
        self.code = code
        self.headers = dict(headers or {})

    @property
    def body(self) -> dict[str, Any]:
        """The response's body."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {
            "error": {
                "message": self.message,
                "type": _KINDS.get(self.status, kind),
                "param": self.param,
                "code": self.code,
            }
        }


def invalid(message: str, param: str | None = None, code: str | None = None) -> Refusal:
    """The request cannot be carried out as given: 400."""
    return Refusal(400, message, param=param, code=code)


def unfit(error: MmlmError, param: str | None = None, code: str | None = None) -> Refusal:
    """One of mmlm's own errors, with its advice, as an answer to the client: 400."""
    return invalid(f"{error} {error.advice}".strip(), param, code)


def too_many(limit: int, seconds: int) -> Refusal:
    """So many requests are under way that another one would only wait: 429."""
    return Refusal(
        429,
        f"{limit} requests are being answered or wait already. Try again in {seconds} s.",
        code="rate_limit_exceeded",
        headers={"Retry-After": str(seconds)},
    )


def failed(message: str) -> Refusal:
    """The server could not do it, whatever the request was: 500."""
    return Refusal(500, message, code="server_error")
