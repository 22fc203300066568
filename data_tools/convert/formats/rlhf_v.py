"""RLHF-V's published data (``openbmb/RLHF-V-Dataset``, arXiv 2312.00849): parquet or JSON lines.

``text`` is a JSON text with ``question``, ``chosen`` and ``rejected``; ``image`` holds the
picture's bytes in parquet. The remaining fields are kept as they are.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import identifier, rest, text
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import PreferenceRecord, RecordError, user

__all__ = ["SUMMARY", "record", "recognises"]

SUMMARY = "RLHF-V: text (a JSON text with question, chosen, rejected), image or image_path, idx"


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    try:
        return {"question", "chosen", "rejected"} <= _answers(row).keys()
    except RecordError:
        return False


def record(row: Mapping[str, Any], place: int, pictures: Pictures) -> PreferenceRecord:
    """Reads one row.

    Args:
        row: The row.
        place: Number of the row; not needed.
        pictures: Finds the pictures.

    Raises:
        RecordError: If a field is missing or wrong.
    """
    answers = _answers(row)
    return PreferenceRecord(
        id=identifier(row, "idx"),
        images=(pictures.path(row.get("image") or row.get("image_path")),),
        prompt=user(text(answers, "question"), 1),
        chosen=text(answers, "chosen"),
        rejected=text(answers, "rejected"),
        meta=rest(row, "text", "image", "idx"),
    )


def _answers(row: Mapping[str, Any]) -> Mapping[str, Any]:
    value = row.get("text")
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError as error:
            raise RecordError(f"`text` is no JSON ({error})") from error
    if not isinstance(value, Mapping):
        raise RecordError("`text` must hold an object with question, chosen and rejected")
    return value
