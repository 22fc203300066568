"""The wire of chat completions: addresses and keys, and what a server's answers mean."""

from __future__ import annotations

import email.utils
import json
import re
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from mmlm.errors import InputError

__all__ = [
    "OPENAI",
    "Choice",
    "Passing",
    "Refused",
    "check_status",
    "checked_key",
    "checked_url",
    "read_choices",
    "valid_text",
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


@dataclass(frozen=True)
class Choice:
    """One of the replies in a chat completion.

    Attributes:
        text: What was said, valid UTF-8; None if the server gave no text at all.
        finish: Why it ended: "stop" (by itself, or at a stop sequence), "length", ...; "" if the
            server does not say.
        refused: The model, or a filter behind it, would not reply.
        stopped_by: The stop sequence that ended it, where the server says so: vLLM in
            ``stop_reason``, SGLang in ``matched_stop``.
    """

    text: str | None
    finish: str = ""
    refused: bool = False
    stopped_by: str | None = None


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
        content = json.loads(body)
    except (ValueError, RecursionError):
        return "", ""
    # OpenAI, llama.cpp and today's vLLM have an object `error`; SGLang and older vLLM write its
    # fields at the top, other frameworks `detail`.
    error = content.get("error", content) if isinstance(content, dict) else content
    if not isinstance(error, dict):
        error = {"message": error} if isinstance(error, str) else {}
    line = " ".join(str(error.get("message") or error.get("detail") or "").split())
    return f" ({valid_text(line)[:200]})" if line else "", str(error.get("code"))


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


def read_choices(body: bytes) -> list[Choice]:
    """The replies in a chat completion, at least one, in the order of their ``index``.

    Raises:
        Passing: If the body is not what the interface promises.
    """
    try:
        choices = json.loads(body)["choices"]
        ordered = sorted(choices, key=_index)
        read = [_choice(choice) for choice in ordered]
    except (ValueError, RecursionError) as error:
        raise Passing("an answer that is no JSON") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise Passing("an answer that is no chat completion") from error
    if not read:
        raise Passing("an answer that is no chat completion")
    return read


def _index(choice: Mapping[str, Any]) -> int:
    index = choice.get("index", 0)
    return index if isinstance(index, int) else 0  # without numbers: as they came


def _choice(choice: Mapping[str, Any]) -> Choice:
    message, finish = choice["message"], choice.get("finish_reason")
    text, refusal = message.get("content"), message.get("refusal")
    if text is not None and not isinstance(text, str):
        raise Passing("an answer whose content is no text")
    marks = (choice.get("stop_reason"), choice.get("matched_stop"))
    return Choice(
        text=None if text is None else valid_text(text),
        finish=finish if isinstance(finish, str) else "",
        refused=finish == "content_filter" or bool(refusal),
        stopped_by=next((mark for mark in marks if isinstance(mark, str) and mark), None),
    )


def valid_text(text: str) -> str:
    """The text with everything that UTF-8 cannot express replaced by question marks."""
    return text.encode("utf-8", "replace").decode("utf-8")


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
