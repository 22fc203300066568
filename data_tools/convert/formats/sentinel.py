"""SENTINEL's published pairs (arXiv 2507.12455): JSON lines, or lists of pairs by picture.

The files of the authors' code (commit 0260bc9) hold ``image_id``, ``image_path``, ``question``,
``context``, ``y_win``, ``y_lose``, ``type`` and two lists of objects. Data for LLaMA-Factory says
``win`` and ``lose``; data for LLaVA is ``{image_id: [pair, ...]}`` without paths: its pictures are
found by their names in the folder of pictures (Visual Genome: ``VG_100K/2324811.jpg``).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import identifier, rest, text
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import PreferenceRecord, user

__all__ = ["SUMMARY", "record", "recognises"]

SUMMARY = "SENTINEL's published pairs: question, context, y_win, y_lose (or win, lose)"
_USED = ("question", "context", "y_win", "y_lose", "win", "lose", "image_path", "id")


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    return bool({"y_win", "win"} & row.keys() and {"y_lose", "lose"} & row.keys())


def record(row: Mapping[str, Any], place: int, pictures: Pictures) -> PreferenceRecord:
    """Reads one row; its answers are sentences, after which a caption may go on.

    Args:
        row: The row.
        place: Number of the row, from 1: pairs have no identifier of their own.
        pictures: Finds the pictures.

    Raises:
        RecordError: If a field is missing or wrong.
    """
    image_id = identifier(row, "image_id", "image_path")
    path = row.get("image_path")
    return PreferenceRecord(
        id=str(row.get("id") or f"{image_id}-{place}"),
        images=(pictures.path(path) if path else pictures.of_id(image_id),),
        prompt=user(text(row, "question"), 1),
        chosen=text(row, "y_win" if "y_win" in row else "win"),
        rejected=text(row, "y_lose" if "y_lose" in row else "lose"),
        context=text(row, "context", "").strip(),
        chosen_complete=False,
        rejected_complete=False,
        meta=rest(row, *_USED),
    )
