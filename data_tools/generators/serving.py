"""The options behind a generator on a server; light, so that a command's help is there at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_tools.generators.chat_prompts import ContinueMode
from mmlm.chat_server.options import ServerOptions, open_server
from mmlm.errors import InputError

if TYPE_CHECKING:
    from data_tools.generators.openai import OpenAIGenerator

__all__ = ["OpenAIOptions", "open_generator"]


@dataclass(frozen=True)
class OpenAIOptions(ServerOptions):
    """A server that samples sentences.

    Attributes:
        base_url: Address of the server, up to /v1; vLLM's default port is 8000, SGLang's 30000.
        model: Name of the model on the server.
        max_tokens: Most new tokens of a sentence; a longer one is no sample.
        concurrency: Requests under way at the same time; the server should always have some
            waiting.
        timeout: Longest time for one try, in seconds.
        continue_mode: How the caption so far is given: `auto` as an open turn, after making sure
            that the server goes on with one; `prefill` without making sure; `ask` in the
            question, for servers that only answer anew (api.openai.com).
        samples_per_request: Most samples that one request asks for. A server that gives one only,
            or the same one several times, is found out and asked one by one anyway.
    """

    base_url: str = "http://localhost:8000/v1"
    model: str | None = None
    max_tokens: int = 512
    concurrency: int = 16
    timeout: float = 300.0
    continue_mode: ContinueMode = "auto"
    samples_per_request: int | None = None


def open_generator(options: OpenAIOptions, prefix: str = "--server") -> OpenAIGenerator:
    """The generator that a command's options name; nothing is sent.

    Args:
        options: The options.
        prefix: What stands before their names on the command line.

    Raises:
        InputError: If an option is missing or cannot be right.
    """
    from data_tools.generators.openai import OpenAIGenerator

    if options.model is None:
        raise InputError(
            f"{prefix}.model is missing.",
            advice="Name the model as the server does; GET <base_url>/models lists the names.",
        )
    server = open_server(options, prefix)
    try:
        return OpenAIGenerator(
            options.model,
            server,
            max_tokens=options.max_tokens,
            limit_field=options.limit_field,
            continue_mode=options.continue_mode,
            samples_per_request=options.samples_per_request,
        )
    except ValueError as error:
        raise InputError(f"{prefix}.{error}", advice="Correct the option.") from error
