"""Our own pairs: those of SENTINEL and MIA-DPO, and the one form that both are converted to.

``{"id", "images", "prompt", "context", "chosen", "rejected", "complete", "meta"}``; ``prompt`` is
the user's turn as segments, or a list of messages if there are several turns. Where only one of the
answers ends its turn, ``chosen_complete`` and ``rejected_complete`` stand in the place of
``complete``. SENTINEL's pairs say ``question`` instead of ``prompt``, and ``..._final`` instead of
``..._complete``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import identifier, images, rest, text
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import Message, PreferenceRecord, RecordError, user

__all__ = ["FORMS", "SUMMARY", "messages_of", "record", "recognises", "row"]

SUMMARY = "our own pairs: id, images, prompt (segments) or question, context, chosen, rejected"
FORMS = ("jsonl",)
_USED = (
    *("id", "images", "prompt", "question", "context", "chosen", "rejected"),
    *("complete", "chosen_complete", "rejected_complete"),
    *("is_final", "chosen_final", "rejected_final", "meta"),
)


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    prompted = isinstance(row.get("prompt"), list) or isinstance(row.get("question"), str)
    return (
        prompted
        and isinstance(row.get("images"), list)
        and isinstance(row.get("chosen"), str)
        and "id" in row
    )


def record(row: Mapping[str, Any], place: int, pictures: Pictures) -> PreferenceRecord:
    """Reads one row.

    Args:
        row: The row.
        place: Number of the row; not needed.
        pictures: Finds the pictures.

    Raises:
        RecordError: If a field is missing or wrong.
    """
    paths = images(row.get("images"), pictures)
    if row.get("prompt") is None:
        prompt = user(text(row, "question"), len(paths))
    else:
        prompt = messages_of(row["prompt"])
    meta = row.get("meta")
    return PreferenceRecord(
        id=identifier(row, "id"),
        images=paths,
        prompt=prompt,
        chosen=text(row, "chosen"),
        rejected=None if row.get("rejected") is None else text(row, "rejected"),
        context=text(row, "context", ""),
        chosen_complete=_complete(row, "chosen"),
        rejected_complete=_complete(row, "rejected"),
        meta={**rest(row, *_USED), **(meta if isinstance(meta, Mapping) else {})},
    )


def _complete(row: Mapping[str, Any], answer: str) -> bool:
    """Whether an answer ends the turn: its own field, else that of both, else yes."""
    for name in (f"{answer}_complete", f"{answer}_final", "complete", "is_final"):
        if row.get(name) is not None:
            return bool(row[name])
    return True


def messages_of(value: Any) -> tuple[Message, ...]:
    """A prompt given as segments or as messages of segments, as messages.

    Raises:
        RecordError: If it is neither.
    """
    if not isinstance(value, list) or not all(isinstance(part, Mapping) for part in value):
        raise RecordError("`prompt` must be a list of segments or of messages")
    messages = value if value and "role" in value[0] else [{"role": "user", "content": value}]
    checked: list[Message] = []
    for message in messages:
        content = message.get("content")
        if not isinstance(content, list):
            raise RecordError("the content of a message must be a list of segments")
        checked.append(
            {"role": str(message.get("role")), "content": [_segment(part) for part in content]}
        )
    return tuple(checked)


def _segment(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text":
        return {"type": "text", "text": text(part, "text")}
    raise RecordError(f"a segment of `prompt` has the type {kind!r}; known are text and image")


def row(record: PreferenceRecord) -> dict[str, Any]:
    """Writes one record; nothing is lost."""
    single = len(record.prompt) == 1
    written: dict[str, Any] = {
        "id": record.id,
        "images": list(record.images),
        "prompt": record.prompt[0]["content"] if single else list(record.prompt),
        "context": record.context,
        "chosen": record.chosen,
    }
    if record.rejected is not None:
        written["rejected"] = record.rejected
    if record.rejected is None or record.chosen_complete == record.rejected_complete:
        written["complete"] = record.chosen_complete
    else:
        written["chosen_complete"] = record.chosen_complete
        written["rejected_complete"] = record.rejected_complete
    return written | {"meta": dict(record.meta)}
