"""POVID's published data (arXiv 2402.11411): LLaVA conversations in two versions.

``conversations`` ends with the better answer, ``rejected_conversations`` with the worse one; the
turns before are the same. Field names as the authors' training code reads them
(``llava/train/train_dpo.py``); that every entry has an ``id`` could not be verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import identifier, images, rest, turns
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import Message, PreferenceRecord, RecordError, placeholders

__all__ = ["SUMMARY", "record", "recognises"]

SUMMARY = "POVID: conversations, rejected_conversations, image, id"


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    return {"conversations", "rejected_conversations"} <= row.keys()


def record(row: Mapping[str, Any], place: int, pictures: Pictures) -> PreferenceRecord:
    """Reads one row.

    Args:
        row: The row.
        place: Number of the row: the identifier of an entry without one.
        pictures: Finds the pictures.

    Raises:
        RecordError: If a field is missing or wrong, or the two conversations differ before their
            last answers.
    """
    better = turns(row.get("conversations"), "conversations")
    worse = turns(row.get("rejected_conversations"), "rejected_conversations")
    if better[:-1] != worse[:-1]:
        raise RecordError("the two conversations differ before their last answers")
    return PreferenceRecord(
        id=identifier(row, "id") if row.get("id") is not None else f"row-{place}",
        images=images(row.get("image"), pictures),
        prompt=tuple(better[:-1]),
        chosen=answer(better[-1]),
        rejected=answer(worse[-1]),
        meta=rest(row, "id", "image", "conversations", "rejected_conversations"),
    )


def answer(message: Message) -> str:
    """The text of an assistant's turn.

    Raises:
        RecordError: If it is a turn of the user.
    """
    if message["role"] != "assistant":
        raise RecordError("the conversation does not end with an answer")
    return placeholders(message["content"])
