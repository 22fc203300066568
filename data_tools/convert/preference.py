"""The one type that every format is read into and written from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from mmlm.errors import InputError

__all__ = [
    "PLACEHOLDER",
    "Message",
    "PreferenceRecord",
    "Problem",
    "RecordError",
    "Unwritable",
    "check",
    "contents",
    "placeholders",
    "user",
]

Message: TypeAlias = dict[str, Any]
PLACEHOLDER = "<image>"
"""What the published formats write where a picture stands (LLaVA's token)."""


class RecordError(ValueError):
    """One record cannot be used; the others may."""


class Unwritable(InputError):  # noqa: N818  (the name says what it is)
    """A format cannot express a record, and leaving records out would change the data set."""


@dataclass(frozen=True)
class Problem:
    """A record that was left out.

    Attributes:
        place: Where it stands: file and line, or row.
        reason: What is wrong with it.
    """

    place: str
    reason: str


@dataclass(frozen=True)
class PreferenceRecord:
    """A better and a worse answer to the same prompt, or one answer only.

    Attributes:
        id: Unique in its file.
        images: Paths, in the order of the prompt's image segments.
        prompt: Messages in Hugging Face chat format, of ``user`` and ``assistant`` in turn, the
            last of the user; every content is a list of text and image segments.
        chosen: The better answer, or the only one.
        rejected: The worse answer; None in data for supervised training.
        context: What the assistant has said already: it stands before both answers and is not
            learned (C-DPO, arXiv 2507.12455). "" if the answers begin the turn. No blank at
            its end.
        chosen_complete: Whether the better answer ends the turn, so that an end token belongs
            behind it. A sentence of a caption that goes on does not.
        rejected_complete: Likewise.
        meta: Everything else that the source says.
    """

    id: str
    images: tuple[str, ...]
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str | None = None
    context: str = ""
    chosen_complete: bool = True
    rejected_complete: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether all its answers end the turn."""
        return self.chosen_complete and (self.rejected is None or self.rejected_complete)


def contents(text: str) -> list[dict[str, str]]:
    """A text with ``<image>`` in it as segments.

    LLaVA moves the only picture of a message to its front and writes a line end behind it; that
    line end belongs to the notation and not to the text.
    """
    parts = text.split(PLACEHOLDER)
    if len(parts) == 2 and not (parts[0].strip() and parts[1].strip()):
        words = parts[0].strip() or parts[1].strip()
        return [{"type": "image"}, *([{"type": "text", "text": words}] if words else [])]
    segments: list[dict[str, str]] = []
    for number, part in enumerate(parts):
        if number:
            segments.append({"type": "image"})
        if part:
            segments.append({"type": "text", "text": part})
    return segments


def placeholders(content: Sequence[Mapping[str, Any]]) -> str:
    """Segments as a text with ``<image>`` in it, the way LLaVA's files have it.

    Raises:
        Unwritable: If the text itself holds ``<image>``.
    """
    texts = [part["text"] for part in content if part["type"] == "text"]
    if any(PLACEHOLDER in text for text in texts):
        raise Unwritable(
            f"A prompt holds {PLACEHOLDER} as text, which this format takes for a picture.",
            advice="Remove it, or write --to mmlm.",
        )
    if [part["type"] for part in content] == ["image", "text"]:
        return f"{PLACEHOLDER}\n{texts[0]}"
    return "".join(part["text"] if part["type"] == "text" else PLACEHOLDER for part in content)


def user(text: str, n_images: int) -> tuple[Message, ...]:
    """A prompt of one turn, its pictures before the text."""
    images = [{"type": "image"}] * n_images
    return ({"role": "user", "content": [*images, {"type": "text", "text": text}]},)


def check(record: PreferenceRecord) -> None:
    """Refuses a record that cannot be learned from.

    Raises:
        RecordError: Says why, with both numbers if pictures and placeholders do not match.
    """
    if not record.id:
        raise RecordError("it has no id")
    _check_turns(record.prompt)
    n_segments = sum(part["type"] == "image" for part in _parts(record.prompt))
    if n_segments != len(record.images):
        raise RecordError(
            f"the prompt has {n_segments} image placeholders for {len(record.images)} pictures"
        )
    if not any(part.get("text", "").strip() for part in _parts(record.prompt)):
        raise RecordError("the prompt has no text")
    for name in ("chosen", "rejected"):
        answer = getattr(record, name)
        if answer is not None and not answer.strip():
            raise RecordError(f"`{name}` is empty")
        if answer is not None and PLACEHOLDER in answer:
            raise RecordError(f"`{name}` holds {PLACEHOLDER}")
    if record.rejected is not None and _plain(record.chosen) == _plain(record.rejected):
        raise RecordError("`chosen` and `rejected` are equal but for blanks and case")


def _check_turns(prompt: Sequence[Message]) -> None:
    roles = [message["role"] for message in prompt]
    wanted = [("user", "assistant")[n % 2] for n in range(len(roles))]
    if not roles or roles != wanted or roles[-1] != "user":
        raise RecordError(
            f"the turns before the answer are {', '.join(roles) or 'none'}; user and assistant "
            "must take turns, and the user speak last"
        )


def _parts(prompt: Sequence[Message]) -> Iterable[Mapping[str, Any]]:
    return (part for message in prompt for part in message["content"])


def _plain(text: str) -> str:
    return " ".join(text.split()).casefold()
