"""The wire of chat completions: addresses and keys, and what a server's answers mean."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from benchmarks.judges import valid_text
from mmlm.errors import InputError

__all__ = [
    "OPENAI",
    "Passing",
    "Refused",
    "check_status",
    "checked_key",
    "checked_url",
    "read_reply",
]

OPENAI = "https://api.openai.com/v1"

PASSING = {408, 409, 425, 429} | set(range(500, 600))
HOPELESS = {
    401: "Check the key: the option that names its environment variable, and its value.",
    403: "The key may not use this model; choose another one.",
    404: "Check the address (it usually ends in /v1) and the name of the model.",
}


class Passing(Exception):  # noqa: N818  (a state of the server, not an error of ours)
    """Trouble that may be over at the next try."""

    def __init__(self, reason: str, wait: float | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.wait = wait


class Refused(Exception):  # noqa: N818
    """Asking the same again is pointless."""

    def __init__(self, reason: str, *, silent: bool = False, advice: str = "") -> None:
        super().__init__(reason)
        self.reason = reason
        self.silent = silent
        self.advice = advice


def check_status(status: int, headers: Mapping[str, str], body: bytes) -> None:
    """Raises what an HTTP status other than success means."""
    if 200 <= status < 300:
        return
    detail, code = _error_of(body)
    reason = f"HTTP {status}{detail}"
    if code == "insufficient_quota":  # comes with 429, but no waiting helps
        raise Refused(reason, silent=True, advice="The account has no credit left; see there.")
    if status in PASSING:
        raise Passing(reason, _retry_after(headers.get("retry-after")))
    raise Refused(reason, silent=True, advice=HOPELESS.get(status, ""))


def _error_of(body: bytes) -> tuple[str, str]:
    """The server's own words in one short line, and its error code; both may be empty."""
    try:
        error = json.loads(body)["error"]
        message, code = error["message"], error.get("code")
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "", ""  # free to say nothing, or anything else
    line = " ".join(str(message).split())
    return f" ({valid_text(line)[:200]})" if line else "", str(code)


def _retry_after(value: str | None) -> float | None:
    """Seconds from a Retry-After header: a number or a date; None if it says neither."""
    if value is None:
        return None
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return float(value)
    try:
        date = email.utils.parsedate_to_datetime(value)
    except ValueError:
        return None
    return max(0.0, date.timestamp() - time.time())


def read_reply(body: bytes) -> str:
    """The text of a chat completion.

    Raises:
        Passing: If the body is not what the interface promises.
        Refused: If it is, and holds no whole reply.
    """
    try:
        choice = json.loads(body)["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message.get("content")
        refusal = message.get("refusal")
    except (ValueError, RecursionError) as error:
        raise Passing("an answer that is no JSON") from error
    except (KeyError, IndexError, TypeError, AttributeError) as error:
        raise Passing("an answer that is no chat completion") from error
    if finish == "length":
        raise Refused("the reply was cut off at the token limit")
    if finish == "content_filter" or refusal:
        raise Refused("the judge refused to reply")
    if not isinstance(text, str):
        raise Passing("an answer whose content is no text")
    if not text.strip():
        raise Passing("an empty reply")
    return valid_text(text)


def checked_url(base_url: str) -> str:
    """The address of the chat completions.

    Raises:
        InputError: If it is no address of a server.
    """
    try:
        parts = urlsplit(base_url)
        usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
    except ValueError:  # a port that is no number
        usable = False
    if not usable:
        raise InputError(
            f"{base_url!r} is no address of a server.",
            advice=f"Write it like {OPENAI} or http://localhost:8000/v1.",
        )
    return base_url.rstrip("/") + "/chat/completions"


def checked_key(key: str | None) -> str:
    """The key without blanks around it; "" for none.

    Raises:
        InputError: If it cannot be a key; the message does not show it.
    """
    plain = (key or "").strip()
    if not (plain.isascii() and plain.isprintable()) or " " in plain:
        raise InputError(
            "The API key holds characters that no key has (blanks, line ends, non-ASCII).",
            advice="Set the environment variable to the key alone.",
        )
    return plain
