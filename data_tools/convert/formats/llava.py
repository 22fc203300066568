"""LLaVA's conversations for supervised training (arXiv 2304.08485): JSON.

``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}``, with ``<image>``
where the picture stands; ``image`` is missing in entries without one, and a list in data with
several pictures.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import identifier, images, rest, turns
from data_tools.convert.formats.povid import answer
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import Message, PreferenceRecord, Unwritable, placeholders

__all__ = ["FORMS", "SUMMARY", "conversation", "record", "recognises", "row"]

SUMMARY = "LLaVA's conversations for supervised training: conversations, image, id"
FORMS = ("json", "jsonl")
_SPEAKERS = {"user": "human", "assistant": "gpt"}


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    other = {"rejected_conversations", "chosen", "rejected"}
    return "conversations" in row and not other & row.keys()


def record(row: Mapping[str, Any], place: int, pictures: Pictures) -> PreferenceRecord:
    """Reads one row: the last answer is ``chosen``, and there is no worse one.

    Args:
        row: The row.
        place: Number of the row; not needed.
        pictures: Finds the pictures.

    Raises:
        RecordError: If a field is missing or wrong.
    """
    messages = turns(row.get("conversations"), "conversations")
    return PreferenceRecord(
        id=identifier(row, "id"),
        images=images(row.get("image"), pictures),
        prompt=tuple(messages[:-1]),
        chosen=answer(messages[-1]),
        meta=rest(row, "id", "image", "conversations"),
    )


def row(record: PreferenceRecord) -> dict[str, Any]:
    """Writes one record; of a preference the better answer, behind its context.

    Raises:
        Unwritable: If the answer does not end its turn: LLaVA's training would end it there.
    """
    if not record.chosen_complete:
        raise Unwritable(
            f"The answer of {record.id!r} does not end the turn, and this format has no way to "
            "say so: training would teach the model to stop there.",
            advice="Write --to mmlm, whose records say it (`complete`).",
        )
    written: dict[str, Any] = {"id": record.id}
    if record.images:
        written["image"] = record.images[0] if len(record.images) == 1 else list(record.images)
    spoken = f"{record.context} {record.chosen}" if record.context else record.chosen
    written["conversations"] = [
        *conversation(record.prompt),
        {"from": "gpt", "value": spoken},
    ]
    return written


def conversation(prompt: tuple[Message, ...]) -> list[dict[str, str]]:
    """Messages in LLaVA's notation."""
    return [
        {"from": _SPEAKERS[message["role"]], "value": placeholders(message["content"])}
        for message in prompt
    ]
