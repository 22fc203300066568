"""The body of a chat completion request, read strictly: what it holds is done, or it is refused.

A field that the server would have to ignore is worse than an error, since nobody would notice. So
every field is in one of four lists: those that count (`ChatRequest`), those that count only with
the value that asks for nothing (`_NEUTRAL`), remarks for the operator's books (`_REMARKS`), and all
others, which are unknown. ``null`` is the same as leaving a field out.
"""

from __future__ import annotations

import difflib
import json
import re
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError
from pydantic_core import from_json

from mmlm.serve.refusals import invalid

__all__ = [
    "ChatRequest",
    "ImagePart",
    "Message",
    "Part",
    "StreamOptions",
    "TextPart",
    "read_request",
]

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "best_of": (1,),
    "frequency_penalty": (0,),
    "function_call": ("none",),
    "functions": ([],),
    "logit_bias": ({},),
    "logprobs": (False,),
    "min_p": (0,),
    "modalities": (["text"],),
    "n": (1,),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "presence_penalty": (0,),
    "reasoning_effort": ("none",),
    "repetition_penalty": (1,),
    "response_format": ({"type": "text"},),
    "store": (False,),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "top_k": (-1, 0),
    "top_logprobs": (0,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
_REMARKS = frozenset(
    {
        "metadata",
        "no_stop_trim",  # SGLang's twin of include_stop_str_in_output; sent along with it
        "prompt_cache_key",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "user",
    }
)

COLDEST = 0.01
"""Lowest temperature above 0: dividing by less than this leaves the range of the numbers."""

_LONGEST_NAME = 80
_LONGEST = 300
"""Most characters of what pydantic says; it may quote the request."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextPart(_Strict):
    """A piece of text."""

    type: Literal["text"]
    text: str


class ImageAddress(_Strict):
    """Where a picture is; ``detail`` changes nothing: models here read pictures in one way."""

    url: str
    detail: Literal["auto", "low", "high"] = "auto"


class ImagePart(_Strict):
    """A picture, at this place of the message."""

    type: Literal["image_url"]
    image_url: ImageAddress


Part: TypeAlias = Annotated[TextPart | ImagePart, Field(discriminator="type")]


def _kind(content: Any) -> str | None:
    return "words" if isinstance(content, str) else "parts" if isinstance(content, list) else None


Content: TypeAlias = Annotated[
    Annotated[str, Tag("words")] | Annotated[list[Part], Tag("parts")],
    Discriminator(
        _kind,
        custom_error_type="content",
        custom_error_message="It must be text, or a list of parts",
    ),
]


class Message(_Strict):
    """One message. What an answer of ours has beside its text may be sent back with it."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Content
    name: None = None
    refusal: None = None
    audio: None = None
    function_call: None = None
    tool_calls: Annotated[list[Any], Field(max_length=0)] | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None

    @property
    def parts(self) -> tuple[TextPart | ImagePart, ...]:
        """The content as parts, whichever way it was written."""
        if isinstance(self.content, str):
            return (TextPart(type="text", text=self.content),)
        return tuple(self.content)


class StreamOptions(_Strict):
    """What a stream tells beside the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False


class ChatRequest(_Strict):
    """The fields that count."""

    model: Annotated[str, Field(min_length=1, max_length=4096)]
    messages: Annotated[list[Message], Field(min_length=1)]
    mmlm_methods: Annotated[list[str], Field(max_length=16)] | None = None
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    seed: Annotated[int, Field(ge=0, lt=2**63)] | None = None
    stop: list[str] = []
    include_stop_str_in_output: bool = False
    continue_final_message: bool = False
    add_generation_prompt: bool = True
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()


def read_request(body: bytes) -> ChatRequest:
    """Reads a request.

    Args:
        body: JSON in UTF-8.

    Raises:
        Refusal: For what is no JSON object, an unknown field, a value of the wrong type or out of
            range, and for whatever this server cannot do.
    """
    try:
        given = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise invalid(f"The body is no JSON: {error}.", code="invalid_json") from None
    if not isinstance(given, dict):
        raise invalid("The body must be a JSON object.", code="invalid_json")
    given = _without_neutral({name: value for name, value in given.items() if value is not None})
    if isinstance(given.get("stop"), str):
        given["stop"] = [given["stop"]]
    try:
        request = ChatRequest.model_validate(given)
    except ValidationError as error:
        raise _refusal(error, given) from None
    _check_together(request)
    return request


def _without_neutral(given: dict[str, Any]) -> dict[str, Any]:
    """Takes out the fields that ask for nothing; refuses those that ask for something else."""
    kept = {}
    for name, value in given.items():
        if name in _REMARKS:
            continue
        if name not in _NEUTRAL:
            if name not in ChatRequest.model_fields:
                name = name[:_LONGEST_NAME]
                raise invalid(_unknown(name), name, "unknown_parameter")
            kept[name] = value
        elif not any(value == allowed for allowed in _NEUTRAL[name]):
            values = " or ".join(json.dumps(allowed) for allowed in _NEUTRAL[name])
            also = f", or give {values}" if values else ""
            raise invalid(
                f"{name} is not supported here. Leave it out{also}.", name, "unsupported_parameter"
            )
    return kept


def _unknown(name: str) -> str:
    known = {*ChatRequest.model_fields, *_NEUTRAL, *_REMARKS}
    close = difflib.get_close_matches(name, known, n=1)
    hint = f"Did you mean {close[0]}?" if close else "Leave it out."
    return f"There is no field {name!r}. {hint}"


def _refusal(error: ValidationError, given: dict[str, Any]) -> Exception:
    """The first of pydantic's findings, in one sentence."""
    found = error.errors(include_url=False, include_input=False)[0]
    place = _place(found["loc"], given)
    # Without the names of our classes, and never a whole picture back to who sent it.
    message = re.sub(r" or instance of \w+", "", found["msg"])[:_LONGEST].rstrip(".")
    if found["type"] == "missing":
        return invalid(f"{place} is missing.", place, "missing_required_parameter")
    if found["type"] == "extra_forbidden":
        return invalid(f"There is no field {place}. Leave it out.", place, "unknown_parameter")
    return invalid(f"{place}: {message}.", place, "invalid_value")


def _place(keys: tuple[int | str, ...], given: Any) -> str:
    """The path of a finding in the body, without the names that pydantic gives to alternatives."""
    path = []
    for number, key in enumerate(keys):
        if isinstance(given, list) and isinstance(key, int) and key < len(given):
            given = given[key]
        elif isinstance(given, dict) and key in given:
            given = given[key]
        elif number < len(keys) - 1:
            continue  # the name of an alternative
        elif not isinstance(given, dict):
            break
        path.append(str(key)[:_LONGEST_NAME])
    return ".".join(path)


def _check_together(request: ChatRequest) -> None:
    """Fields that are right alone and wrong together."""
    both = (request.max_tokens, request.max_completion_tokens)
    if None not in both and both[0] != both[1]:
        raise invalid(
            "max_tokens and max_completion_tokens say different things. Give one of them.",
            "max_tokens",
        )
    if 0 < (request.temperature or 0) < COLDEST:
        raise invalid(
            f"temperature is {request.temperature}; give 0 for the most probable tokens, or at "
            f"least {COLDEST}.",
            "temperature",
            "invalid_value",
        )
    if "" in request.stop:
        raise invalid("A stop sequence is empty. Leave it out.", "stop", "invalid_value")
    last = request.messages[-1].role
    if request.continue_final_message != (last == "assistant"):
        raise invalid(
            f"The last message is of the role {last!r}, and continue_final_message is "
            f"{str(request.continue_final_message).lower()}. An answer that has begun is the last "
            "message, with continue_final_message true; otherwise the last message is the user's.",
            "messages",
        )
    if request.continue_final_message == request.add_generation_prompt:
        wanted = str(not request.continue_final_message).lower()
        raise invalid(f"add_generation_prompt must be {wanted} here.", "add_generation_prompt")
