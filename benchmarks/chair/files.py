"""CHAIR's captions: asking for them, reading them, and the form the authors' scripts take."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_records
from benchmarks.run import Item, Task
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from benchmarks.coco import Picture

__all__ = ["fields_of", "official_lines", "read_captions", "task", "usable", "write_official"]


def task(pictures: Sequence[Picture], folder: Path, prompt: str, variant: str = "wordnet") -> Task:
    """One caption per picture.

    Args:
        pictures: The pictures.
        folder: Where their files are.
        prompt: The question.
        variant: Word procedure of the scorer.
    """
    items = tuple(
        Item(
            Request(str(picture.image_id), (folder / picture.file_name,), prompt),
            {"image_id": picture.image_id, "image": picture.file_name},
        )
        for picture in pictures
    )
    return Task(f"chair/{variant}", items, answer_field="caption")


def read_captions(path: str | Path) -> list[dict[str, Any]]:
    """Reads captions to score: JSON lines or a JSON list, plain or gzipped.

    Understood are ``image_id`` and ``caption`` (COCO's result format, and what `mmlm bench chair`
    writes) and the output of `mmlm generate` (``id``, ``text``) whose ids are image numbers.
    Records that carry an ``error`` have no caption and are left out.

    Raises:
        InputError: If the file cannot be read, or a record lacks a field; duplicate ``id`` too.
    """
    return [
        {"image_id": record["image_id"], "caption": record["caption"]}
        for record in usable(read_records(path), str(path))
    ]


def usable(records: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    """The records that have a caption, with ``image_id`` and ``caption`` under these names.

    Args:
        records: As stored; those with an ``error`` are left out.
        source: Where they come from, for messages.

    Raises:
        InputError: If a record lacks a field, or an id occurs twice.
    """
    seen: set[str] = set()
    captions = []
    for number, record in enumerate(records, start=1):
        place = f"{source}, record {number}"
        if "id" in record:
            if str(record["id"]) in seen:
                raise InputError(
                    f"{place}: id {record['id']!r} occurs twice.",
                    advice="Keep one record per id; one picture may have several ids.",
                )
            seen.add(str(record["id"]))
        if record.get("error"):
            continue
        image, caption = fields_of(record, place)
        captions.append({**record, "image_id": image, "caption": caption})
    return captions


def official_lines(records: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Captions as the scorers of OPERA, PAI and CHAIR-metric-standalone read them.

    Failed requests have no caption and are left out, as in our own scores.

    Raises:
        InputError: If a record lacks a field, an id occurs twice, or no caption is left.
    """
    captions = [
        {"image_id": record["image_id"], "caption": record["caption"]}
        for record in usable(records, "captions")
    ]
    if not captions:
        raise InputError("There are no captions to export.", advice="Repeat the run.")
    return captions


def write_official(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Writes captions for the authors' scripts: one list if the name ends in .json, else lines.

    Raises:
        InputError: As `official_lines`; nothing is written then.
    """
    captions = official_lines(records)
    if path.suffix == ".json":
        text = json.dumps(captions, ensure_ascii=False)
    else:
        text = "\n".join(json.dumps(caption, ensure_ascii=False) for caption in captions)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n", encoding="utf-8", newline="\n")


def fields_of(record: Mapping[str, Any], place: str) -> tuple[int, str]:
    """Picture and caption of a record.

    Raises:
        InputError: If one of them is missing or of the wrong kind; begins with ``place``.
    """
    image = record.get("image_id", record.get("id"))
    caption = record.get("caption", record.get("text"))
    if not isinstance(caption, str):
        raise InputError(
            f"{place}: no caption (field 'caption' is {caption!r}).",
            advice='Every record needs "image_id" (a whole number) and "caption" (a text).',
        )
    if isinstance(image, str) and re.fullmatch(r"\d+", image):
        image = int(image)
    if not isinstance(image, int) or isinstance(image, bool):
        raise InputError(
            f"{place}: image_id must be a whole number, found {image!r}.",
            advice='Every record needs "image_id" (a whole number) and "caption" (a text).',
        )
    return image, caption
