"""RLAIF-V's published data (``openbmb/RLAIF-V-Dataset``, arXiv 2405.17220): parquet.

``image`` holds the picture's bytes, ``question``, ``chosen`` and ``rejected`` are texts; the
remaining fields (``ds_name``, ``origin_dataset``, ``origin_split``, ``image_path``) are kept.
Whether ``idx`` is unique in the published files could not be verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import identifier, rest, text
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import PreferenceRecord, user

__all__ = ["SUMMARY", "record", "recognises"]

SUMMARY = "RLAIF-V: question, chosen, rejected, image or image_path, idx"


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    return {"question", "chosen", "rejected", "idx"} <= row.keys() and bool(
        {"image", "image_path"} & row.keys()
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
    return PreferenceRecord(
        id=identifier(row, "idx"),
        images=(pictures.path(row.get("image") or row.get("image_path")),),
        prompt=user(text(row, "question"), 1),
        chosen=text(row, "chosen"),
        rejected=text(row, "rejected"),
        meta=rest(row, "question", "chosen", "rejected", "image", "idx"),
    )
