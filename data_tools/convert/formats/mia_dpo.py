"""MIA-DPO's published data (arXiv 2410.17637; ``dpo_27k.json``): the form of LLaVA-Hound's DPO.

``prompt``, ``chosen`` and ``rejected`` are texts, ``image`` is one path or a list. With one path
the authors' loader (commit e280d47, ``run_dpo.py``) takes every ``<image>`` out of the prompt and
puts one before it; with a list the prompt says where the pictures stand. Entries with ``video``
are LLaVA-Hound's own and refused. That entries have an ``id`` could not be verified.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from data_tools.convert.fields import identifier, images, rest, text
from data_tools.convert.pictures import Pictures
from data_tools.convert.preference import (
    PLACEHOLDER,
    Message,
    PreferenceRecord,
    RecordError,
    contents,
    user,
)

__all__ = ["SUMMARY", "record", "recognises"]

SUMMARY = "MIA-DPO: prompt (a text), chosen, rejected, image (a path or a list)"


def recognises(row: Mapping[str, Any]) -> bool:
    """Whether a row looks like one of this format."""
    return (
        all(isinstance(row.get(name), str) for name in ("prompt", "chosen", "rejected"))
        and bool({"image", "video"} & row.keys())
        and "images" not in row
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
    if row.get("video") is not None:
        raise RecordError("it is about a video")
    prompt = text(row, "prompt")
    if isinstance(row.get("image"), list):
        turn: tuple[Message, ...] = ({"role": "user", "content": contents(prompt)},)
    else:
        turn = user(prompt.replace(PLACEHOLDER, "").strip(), 1)
    return PreferenceRecord(
        id=identifier(row, "id") if row.get("id") is not None else f"row-{place}",
        images=images(row.get("image"), pictures),
        prompt=turn,
        chosen=text(row, "chosen"),
        rejected=text(row, "rejected"),
        meta=rest(row, "id", "image", "prompt", "chosen", "rejected"),
    )
