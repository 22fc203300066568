"""Strict looks at stored lines and at questions, shared by several benchmarks."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["answer_text", "check_ids", "check_texts", "content_hash"]


def content_hash(value: Any) -> str:
    """SHA-256 of plain JSON, whatever file it came from: ``sha256:<hex>``."""
    canonical = json.dumps(value, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return f"sha256:{hashlib.sha256(canonical.encode('ascii')).hexdigest()}"


def check_ids(lines: Sequence[Mapping[str, Any]]) -> None:
    """Refuses lines without an id, and two lines with one.

    Raises:
        InputError: Names the line.
    """
    seen: set[str] = set()
    for number, line in enumerate(lines, start=1):
        identifier = line.get("id")
        if not isinstance(identifier, str) or not identifier:
            raise InputError(
                f"Line {number} has no id.",
                advice="Score files of `mmlm bench`, or read the official file with its option.",
            )
        if identifier in seen:
            raise InputError(
                f"Line {number}: the id {identifier!r} is there twice.",
                advice="Keep one answer per question.",
            )
        seen.add(identifier)


def check_texts(line: Mapping[str, Any], number: int, names: Sequence[str], source: str) -> None:
    """Refuses a line in which a field that scoring needs is missing or no text.

    Args:
        line: The stored line.
        number: Its number, for the message.
        names: The fields.
        source: The command that writes such lines.

    Raises:
        InputError: Names line and field.
    """
    for name in names:
        if not isinstance(line.get(name), str):
            raise InputError(
                f"Line {number} ({line.get('id')!r}) has no text in {name!r}.",
                advice=f"Score files of `{source}`.",
            )


def answer_text(line: Mapping[str, Any], number: int) -> str | None:
    """The answer in a line; None if the line holds an error instead.

    Raises:
        InputError: If it holds neither.
    """
    if line.get("error"):
        return None
    text = line.get("text")
    if not isinstance(text, str):
        raise InputError(
            f"Line {number} ({line.get('id')!r}): the answer is {text!r}, not a text.",
            advice="Every line needs its answer in 'text', or says in 'error' why there is none.",
        )
    return text
