"""Small checked readings that the formats share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import Message, RecordError, contents

__all__ = ["identifier", "images", "rest", "roles", "text", "turns"]

roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}
"""Names that published files give to the two speakers."""


def text(row: Mapping[str, Any], name: str, default: str | None = None) -> str:
    """A field that must be text.

    Raises:
        RecordError: If it is missing without a default, or no text.
    """
    value = row.get(name, default)
    if value is None:
        value = default
    if not isinstance(value, str):
        raise RecordError(f"`{name}` must be text, got {type(row.get(name)).__name__}")
    return value


def identifier(row: Mapping[str, Any], *names: str) -> str:
    """The first of some fields that says which record it is, as text.

    Raises:
        RecordError: If there is none.
    """
    for name in names:
        value = row.get(name)
        if isinstance(value, (str, int)) and not isinstance(value, bool) and value != "":
            return str(value)
    raise RecordError(f"it has no {' or '.join(f'`{name}`' for name in names)}")


def images(value: Any, pictures: Pictures) -> tuple[str, ...]:
    """Pictures given as one, a list, or None."""
    if value is None:
        return ()
    many = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
    return tuple(pictures.path(one) for one in many)


def turns(conversation: Any, name: str) -> list[Message]:
    """A conversation in LLaVA's notation as messages.

    Raises:
        RecordError: If it is no list of ``{"from", "value"}`` with known speakers.
    """
    if not isinstance(conversation, list) or not conversation:
        raise RecordError(f"`{name}` must be a list of turns")
    messages = []
    for turn in conversation:
        speaker = turn.get("from") if isinstance(turn, Mapping) else None
        if speaker not in roles:
            raise RecordError(f"`{name}` has a turn of {speaker!r}; known are {', '.join(roles)}")
        messages.append({"role": roles[speaker], "content": contents(text(turn, "value"))})
    return messages


def rest(row: Mapping[str, Any], *used: str) -> dict[str, Any]:
    """The fields that were not used and say something."""
    return {key: value for key, value in row.items() if key not in used and value is not None}
