"""The options of commands that ask a server, and the server that they name."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from mmlm.chat_server.client import ChatServer, Patience
from mmlm.chat_server.wire import OPENAI
from mmlm.errors import InputError

__all__ = ["ServerOptions", "open_server", "patience_of"]


@dataclass(frozen=True)
class ServerOptions:
    """A server that speaks OpenAI's chat completions, and how hard it is tried.

    Attributes:
        base_url: Address of the server, up to /v1.
        key_variable: Environment variable that holds the API key. The key itself is never
            stored.
        max_tokens: Longest reply in tokens.
        limit_field: How the server calls that limit; newer models take max_completion_tokens.
        per_minute: Most requests in a minute.
        concurrency: Requests under way at the same time.
        timeout: Longest time for one try, in seconds.
        retries: How often a request is tried again.
    """

    base_url: str = OPENAI
    key_variable: str = "OPENAI_API_KEY"
    max_tokens: int = 1024
    limit_field: Literal["max_tokens", "max_completion_tokens"] = "max_tokens"
    per_minute: float | None = None
    concurrency: int = 4
    timeout: float = 60.0
    retries: int = 5


def patience_of(options: ServerOptions, prefix: str) -> Patience:
    """How hard the server is tried.

    Args:
        options: The options.
        prefix: What stands before their names on the command line, e.g. ``--judge``.

    Raises:
        InputError: If a number makes no sense; names the option.
    """
    if options.max_tokens < 1:
        raise InputError(
            f"{prefix}.max_tokens is {options.max_tokens}; it must be positive.",
            advice="Leave it out for the default.",
        )
    try:
        return Patience(
            timeout=options.timeout,
            retries=options.retries,
            concurrency=options.concurrency,
            per_minute=options.per_minute,
        )
    except ValueError as error:
        raise InputError(f"{prefix}.{error}", advice="Correct the option.") from error


def open_server(options: ServerOptions, prefix: str) -> ChatServer:
    """The server that the options name; nothing is sent.

    Args:
        options: The options.
        prefix: What stands before their names on the command line.

    Raises:
        InputError: If an option cannot be right.
    """
    return ChatServer(
        options.base_url,
        key=os.environ.get(options.key_variable),
        patience=patience_of(options, prefix),
    )
