"""MMIR's files in a local copy: questions of one setting, their pictures, their categories.

The question files name the picture and the text under keys that no published code touches. They are
looked for under a short list of names; where none fits, the keys that are there are shown. Nothing
is joined by guessing.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_json, read_records
from benchmarks.mmir.rules import COUNT
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

__all__ = ["SETTINGS", "Question", "elements_of", "find_pictures", "read_questions"]

SETTINGS = ("mcq", "open")
TRUTH_KEYS = ("gt_ans", "gt", "gt_ids", "answer", "answers", "label")
IMAGE_KEYS = ("image", "image_path", "image_file", "img", "img_path", "file_name")
TEXT_KEYS = ("question", "prompt", "text", "query")
CATEGORY_KEYS = ("category", "error_category", "inconsistency_category", "inconsistency_type")


@dataclass(frozen=True, slots=True)
class Question:
    """One artefact and its inconsistency.

    Attributes:
        index: Position in the file, by which responses are joined.
        source: As in the file: "web page", "poster", or an office document.
        truth: Ids of the one or two elements that conflict.
        text: What the model is asked.
        image: The picture, relative to the folder of pictures.
        elements: Text of each element by id; what a judge sees.
        category: Kind of the inconsistency; "" where the files do not say.
    """

    index: int
    source: str
    truth: tuple[int, ...]
    text: str
    image: str
    elements: Mapping[int, str]
    category: str = ""


def read_questions(folder: Path, setting: str, count: int = COUNT) -> list[Question]:
    """Reads ``questions_<setting>.json`` and, for the categories, ``metadata.jsonl``.

    Args:
        folder: The copy, with ``images/`` and the question files in it, or in its ``test/``.
        setting: "mcq" or "open".
        count: Number of questions that there must be.

    Raises:
        InputError: If a file is missing, has another number of questions, or lacks a field; names
            the keys that were found.
    """
    root = _root(folder, setting)
    path = root / f"questions_{setting}.json"
    records = _records(path)
    if len(records) != count:
        raise InputError(
            f"{path} has {len(records)} questions; MMIR has {count}.",
            advice="Fetch the data set again; a part of it makes no comparable number.",
        )
    keys = {
        "the true ids": _key(records, TRUTH_KEYS, path, "the true ids"),
        "the picture": _key(records, IMAGE_KEYS, path, "the picture"),
        "the question": _key(records, TEXT_KEYS, path, "the question"),
    }
    _key(records, ("source",), path, "the source")
    categories = _categories(root / "metadata.jsonl", records, keys["the picture"])
    questions = []
    for index, record in enumerate(records):
        place = f"{path}, question {index}"
        questions.append(
            Question(
                index,
                str(record["source"]),
                _truth(record[keys["the true ids"]], place),
                str(record[keys["the question"]]),
                Path(str(record[keys["the picture"]])).name,
                elements_of(record.get("descs"), place) if setting == "open" else _known(record),
                categories.get(index, ""),
            )
        )
    return questions


def find_pictures(questions: Sequence[Question], folder: Path, setting: str) -> dict[str, Path]:
    """Where each picture is, by its name.

    Raises:
        InputError: If one is missing.
    """
    images = _root(folder, setting) / "images"
    paths = {question.image: images / question.image for question in questions}
    if missing := [name for name, path in paths.items() if not path.is_file()]:
        raise InputError(
            f"{len(missing)} of {len(paths)} pictures are not in {str(images)!r}, e.g. "
            f"{missing[0]}.",
            advice="Fetch the data set again, with its images.",
        )
    return paths


def elements_of(descs: Any, place: str) -> dict[int, str]:
    """The elements of an artefact by id, from any of the forms in which a list can be written.

    A mapping from id to text, a list of records with ``id`` and a text, or lines that begin with
    the id, as in ``[3] a heading that says ...``.

    Raises:
        InputError: If it is none of these; shows how it begins.
    """
    found: dict[int, str] = {}
    if isinstance(descs, dict) and all(str(key).isdigit() for key in descs):
        found = {int(key): str(text) for key, text in descs.items()}
    else:
        entries = descs.splitlines() if isinstance(descs, str) else descs
        for entry in entries if isinstance(entries, list) else ():
            found |= _element(entry)
    if not found:
        raise InputError(
            f"{place}: 'descs' holds no numbered elements: {str(descs)[:80]!r}.",
            advice="Expected are lines such as '[3] a heading', records with 'id', or id: text.",
        )
    return found


def _element(entry: Any) -> dict[int, str]:
    if isinstance(entry, dict):
        texts = [str(value) for key, value in entry.items() if key != "id"]
        identifier = str(entry.get("id", ""))
        return {int(identifier): " ".join(texts)} if identifier.isdigit() else {}
    match = re.match(r"\W*(?:id\W*|element\W*)?(\d+)\W+(.*)", str(entry), re.IGNORECASE)
    return {int(match[1]): match[2].strip()} if match else {}


def _known(record: Mapping[str, Any]) -> dict[int, str]:
    """Elements for the multiple choice, where they serve for counts only; none if unreadable."""
    try:
        return elements_of(record.get("descs"), "")
    except InputError:
        return {}


def _root(folder: Path, setting: str) -> Path:
    for root in (folder, folder / "test"):
        if (root / f"questions_{setting}.json").is_file():
            return root
    raise InputError(
        f"There is no questions_{setting}.json in {str(folder)!r}.",
        advice="Give the folder of a local copy of the data set rippleripple/MMIR.",
    )


def _records(path: Path) -> list[dict[str, Any]]:
    data = read_json(path)
    if not isinstance(data, list) or not data or not all(isinstance(r, dict) for r in data):
        raise InputError(f"{path} is no list of questions.", advice="Fetch the data set again.")
    return data


def _key(records: Sequence[Mapping[str, Any]], names: Sequence[str], path: Path, what: str) -> str:
    for name in names:
        if all(name in record for record in records):
            return name
    found = ", ".join(sorted(records[0]))
    raise InputError(
        f"{path}: {what} must stand under {' or '.join(names)}; the first question has {found}.",
        advice="Rename the field to one of these, in every question.",
    )


def _truth(value: Any, place: str) -> tuple[int, ...]:
    values = value if isinstance(value, list) else [value]
    texts = [str(one) for one in values]
    if not 1 <= len(texts) <= 2 or not all(text.isdigit() for text in texts):
        raise InputError(
            f"{place}: the true ids are {json.dumps(value)}.",
            advice="Expected are one or two numbers.",
        )
    return tuple(int(text) for text in texts)


def _categories(path: Path, records: Sequence[Mapping[str, Any]], image_key: str) -> dict[int, str]:
    """Category of each question; empty unless the files say so without any guess."""
    for name in CATEGORY_KEYS:
        if all(isinstance(record.get(name), str) for record in records):
            return {index: str(record[name]) for index, record in enumerate(records)}
    if not path.is_file():
        return {}
    by_image: dict[str, str] = {}
    for row in read_records(path):
        image = next((row[name] for name in IMAGE_KEYS if isinstance(row.get(name), str)), None)
        named = next((row[n] for n in CATEGORY_KEYS if isinstance(row.get(n), str)), None)
        if image is None or named is None or Path(image).name in by_image:
            return {}  # no key, or a picture that stands there twice: the join would be a guess
        by_image[Path(image).name] = named
    images = [Path(str(record[image_key])).name for record in records]
    if not set(images) <= by_image.keys():
        return {}
    return {index: by_image[image] for index, image in enumerate(images)}
