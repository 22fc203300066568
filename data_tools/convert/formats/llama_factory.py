"""LLaMA-Factory's preference data: ShareGPT conversations with two last answers.

``{"conversations": [...], "chosen": {"from", "value"}, "rejected": {...}, "images": [...]}``. The
file needs an entry in ``dataset_info.json``; `dataset_info` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import images, rest, turns
from data_tools.convert.formats.llava import conversation
from data_tools.convert.formats.povid import answer
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import PreferenceRecord, Unwritable

__all__ = ["FORMS", "SUMMARY", "dataset_info", "record", "recognises", "row"]

SUMMARY = "LLaMA-Factory: conversations, chosen and rejected as turns, images"
FORMS = ("json",)


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    return "conversations" in row and all(
        isinstance(row.get(name), Mapping) for name in ("chosen", "rejected")
    )


def record(row: Mapping[str, Any], place: int, pictures: Pictures) -> PreferenceRecord:
    """Reads one row.

    Args:
        row: The row.
        place: Number of the row: the identifier of an entry without one.
        pictures: Finds the pictures.

    Raises:
        RecordError: If a field is missing or wrong.
    """
    return PreferenceRecord(
        id=str(row.get("id") or f"row-{place}"),
        images=images(row.get("images"), pictures),
        prompt=tuple(turns(row.get("conversations"), "conversations")),
        chosen=answer(turns([row["chosen"]], "chosen")[0]),
        rejected=answer(turns([row["rejected"]], "rejected")[0]),
        meta=rest(row, "id", "images", "conversations", "chosen", "rejected"),
    )


def row(record: PreferenceRecord) -> dict[str, Any]:
    """Writes one record.

    Raises:
        Unwritable: If it has no worse answer, a context, or answers that do not end their turn.
    """
    if record.rejected is None or record.context or not record.complete:
        what = (
            "has no rejected answer"
            if record.rejected is None
            else "continues a caption (context) or does not end its turn"
        )
        raise Unwritable(
            f"The record {record.id!r} {what}, which LLaMA-Factory's format cannot express.",
            advice="Write --to mmlm or --to trl-text.",
        )
    return {
        "id": record.id,
        "conversations": conversation(record.prompt),
        "chosen": {"from": "gpt", "value": record.chosen},
        "rejected": {"from": "gpt", "value": record.rejected},
        "images": list(record.images),
    }


def dataset_info(file_name: str) -> dict[str, Any]:
    """The entry for LLaMA-Factory's ``dataset_info.json``."""
    return {
        "file_name": file_name,
        "formatting": "sharegpt",
        "ranking": True,
        "columns": {
            "messages": "conversations",
            "chosen": "chosen",
            "rejected": "rejected",
            "images": "images",
        },
    }
