r"""Conversations for supervised fine-tuning, read strictly from files.

Two forms are known, and told apart by their fields:

    {"id", "image" or "images", "conversations": [{"from": "human", "value": "<image>\n..."}, ...]}
    {"id", "image" or "images", "messages": [{"role": "user", "content": [...]}, ...]}

The first is LLaVA's (arXiv 2304.08485), the second Hugging Face's chat format. A file holds one
row per line, or, as LLaVA's own files do, one JSON array.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.errors import InputError
from mmlm.inputs import Message

__all__ = ["Conversation", "read_conversations"]

PLACEHOLDER = "<image>"
"""What LLaVA's files write where a picture stands, whatever the model's own image token is."""

_SPEAKERS = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
_SPEAKERS["system"] = "system"


@dataclass(frozen=True)
class Conversation:
    """One example: pictures, and turns of which the assistant's are learned.

    Attributes:
        id: Name of the row in its file.
        images: Absolute paths, in the order of the image segments.
        messages: Hugging Face chat messages; every content is a list of segments. An optional
            system message, then user and assistant in turn; the last one is the assistant's.
        place: Where the row stands, ``file:line``, for messages about it.
    """

    id: str
    images: tuple[str, ...]
    messages: tuple[Message, ...]
    place: str


def read_conversations(files: Sequence[str], image_folder: str | None = None) -> list[Conversation]:
    """Reads conversations; the pictures themselves are not opened.

    In LLaVA's form an answer before the first question and a question after the last answer are
    left out, as LLaVA's own code does with the first: nothing can be learned from either.

    Args:
        files: JSON lines (``.jsonl``), or files that hold one JSON array (``.json``).
        image_folder: Where relative paths of pictures start. Default: the folder of their file.

    Returns:
        All rows, in the order of the files.

    Raises:
        InputError: If a file cannot be read, or a row is wrong; names file, line and field.
    """
    rows = [
        _conversation(row, place, Path(image_folder) if image_folder else Path(file).parent)
        for file in files
        for place, row in _raw_rows(file)
    ]
    if not rows:
        raise InputError(
            f"There are no conversations in {', '.join(map(repr, files)) or 'no files'}.",
            advice="Give at least one file with at least one row.",
        )
    return rows


def _raw_rows(file: str) -> Iterator[tuple[str, Any]]:
    try:
        text = Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"The file {file!r} cannot be read: {error}.", advice="Check the path."
        ) from error
    if text.lstrip().startswith("["):
        rows = _parsed(text, file)
        yield from ((f"{file}, row {number}", row) for number, row in enumerate(rows, start=1))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            yield f"{file}:{number}", _parsed(line, f"{file}:{number}")


def _parsed(text: str, place: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _wrong(place, f"it is no JSON ({error})") from error


def _wrong(place: str, reason: str) -> InputError:
    return InputError(
        f"{place}: {reason}.",
        advice="A row is {id, image or images, conversations} or {id, image or images, messages}.",
    )


def _conversation(row: Any, place: str, folder: Path) -> Conversation:
    if not isinstance(row, Mapping):
        raise _wrong(place, f"a row must be an object, not {type(row).__name__}")
    identifier = row.get("id")
    if not isinstance(identifier, (str, int)) or identifier == "":
        raise _wrong(place, f"`id` must be a text or a number, not {identifier!r}")
    if ("conversations" in row) == ("messages" in row):
        raise _wrong(place, f"exactly one of `conversations`, `messages`; it has {sorted(row)}")
    if "messages" in row:
        messages = _chat_messages(row["messages"], place)
    else:
        messages = _answered(_llava_messages(row["conversations"], place))
    images = _images(row, place, folder)
    _check_turns(messages, place)
    n_segments = sum(part["type"] == "image" for one in messages for part in one["content"])
    if n_segments != len(images):
        raise InputError(
            f"{place}: row {identifier!r} has {len(images)} pictures and {n_segments} image "
            "placeholders.",
            advice=f"Write one {PLACEHOLDER} (conversations) or one image segment (messages) for "
            "each picture.",
        )
    return Conversation(str(identifier), images, tuple(messages), place)


def _images(row: Mapping[str, Any], place: str, folder: Path) -> tuple[str, ...]:
    if row.get("image") is not None and row.get("images") is not None:
        raise _wrong(place, "only one of `image`, `images` may be given")
    given = row.get("images") if row.get("image") is None else row["image"]
    paths = [given] if isinstance(given, str) else [] if given is None else given
    if not isinstance(paths, list) or not all(isinstance(p, str) and p for p in paths):
        raise _wrong(place, f"`image` must be a path or a list of paths, not {given!r}")
    return tuple(str((folder / path).absolute()) for path in paths)


def _llava_messages(turns: Any, place: str) -> list[Message]:
    if not isinstance(turns, list) or not turns:
        raise _wrong(place, "`conversations` must be a list of turns")
    messages: list[Message] = []
    for turn in turns:
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in _SPEAKERS:
            raise _wrong(place, f"a turn is from {speaker!r}; known are {', '.join(_SPEAKERS)}")
        value = turn.get("value")
        if not isinstance(value, str):
            raise _wrong(place, f"the `value` of a turn must be a text, not {value!r}")
        messages.append({"role": _SPEAKERS[speaker], "content": _segments(value)})
    return messages


def _segments(text: str) -> list[dict[str, str]]:
    """LLaVA's notation as segments.

    LLaVA's code moves the only picture of a message to its front and writes a line end behind it;
    that line end belongs to the notation. (A picture with words on both sides stays in its place.)
    """
    parts = text.split(PLACEHOLDER)
    if len(parts) == 2 and not (parts[0].strip() and parts[1].strip()):
        parts = ["", parts[0].strip() or parts[1].strip()]
    segments: list[dict[str, str]] = []
    for number, part in enumerate(parts):
        if number:
            segments.append({"type": "image"})
        if part:
            segments.append({"type": "text", "text": part})
    return segments


def _answered(messages: list[Message]) -> list[Message]:
    first = 1 if messages[0]["role"] == "system" else 0
    if len(messages) > first and messages[first]["role"] == "assistant":
        messages = messages[:first] + messages[first + 1 :]
    return messages[:-1] if messages and messages[-1]["role"] == "user" else messages


def _chat_messages(messages: Any, place: str) -> list[Message]:
    if not isinstance(messages, list) or not messages:
        raise _wrong(place, "`messages` must be a list of messages")
    return [_chat_message(message, place) for message in messages]


def _chat_message(message: Any, place: str) -> Message:
    role = message.get("role") if isinstance(message, Mapping) else None
    if role not in ("system", "user", "assistant"):
        raise _wrong(place, f"a message has the role {role!r}; known are system, user, assistant")
    content = message.get("content")
    if isinstance(content, str):
        content = [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise _wrong(place, f"a `content` must be a text or a list of segments, not {content!r}")
    segments: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "image":
            segments.append({"type": "image"})
        elif kind == "text" and isinstance(part.get("text"), str):
            segments.append({"type": "text", "text": part["text"]})
        else:
            raise _wrong(place, f"a segment must be an image or a text, not {part!r}")
    if role == "assistant" and all(part["type"] == "text" for part in segments):
        # Templates may put something between segments; an answer is one text.
        segments = [{"type": "text", "text": "".join(part["text"] for part in segments)}]
    return {"role": role, "content": segments}


def _check_turns(messages: Sequence[Message], place: str) -> None:
    turns = [one["role"] for one in messages if one["role"] != "system"]
    expected = ["user", "assistant"] * (len(turns) // 2)
    if not turns or turns != expected or any(one["role"] == "system" for one in messages[1:]):
        raise _wrong(
            place,
            "turns must be user, assistant, user, assistant, ... (after one system message at "
            f"most); they are {', '.join(one['role'] for one in messages) or 'none'}",
        )
    for number, one in enumerate(messages):
        if one["role"] == "user":
            continue
        if any(part["type"] == "image" for part in one["content"]):
            raise _wrong(place, f"turn {number + 1} ({one['role']}) holds a picture")
        if not "".join(part["text"] for part in one["content"]).strip():
            raise _wrong(place, f"turn {number + 1} ({one['role']}) is empty")
