"""Which pictures a run describes, and what it asks about each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.sentinel.pairs import choose
from data_tools.stages import check_ids
from data_tools.world.export import RUN_RECORD, file_name, write_split
from data_tools.world.language import CAPTION_QUESTIONS
from mmlm.errors import InputError
from mmlm.records import locked, read_lines

__all__ = [
    "PROMPTS",
    "export_world",
    "from_file",
    "from_folder",
    "records_hash",
    "world_records",
]

PROMPTS = (
    "Describe this image in detail.",
    "What can be seen in this picture? Please give a thorough description.",
    "Write a detailed description of everything that the photo shows.",
    "Please explain what is in the image, including the smaller things.",
    "Take a close look at this picture and describe it as completely as you can.",
    "Tell me about this image: what is there, and where?",
    "How would you describe this photo to somebody who cannot see it?",
    "Give a full account of the scene in this image.",
    "Which objects are in the picture, and how do they relate to one another? Describe the scene.",
    "Provide a rich description of the given image.",
    "Can you walk me through the contents of this picture in detail?",
    "Please write a paragraph that describes the image carefully.",
)
"""Questions for pictures without one, in our words. The paper asks the detailed-description prompts
of RLHF-V (``openbmb/RLHF-V-Dataset`` on the Hugging Face hub, field ``question``); to use those,
put them into an input file."""

_SUFFIXES = frozenset({".bmp", ".gif", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"})

Row = dict[str, Any]


def from_file(path: Path, base: Path) -> list[Row]:
    """Reads records of pictures from JSON lines.

    Args:
        path: Lines with ``id``, ``image`` (relative to this file) and ``question`` or ``prompt``.
        base: The folder that the records' paths shall be relative to.

    Raises:
        InputError: If the file is missing, or a line lacks a field or has one of the wrong type.
    """
    rows = []
    for number, line in enumerate(read_lines(path), start=1):
        question = line.get("question", line.get("prompt"))
        identifier = line.get("id")
        # Numbers are common as identifiers; True is an int too.
        if isinstance(identifier, int) and not isinstance(identifier, bool):
            identifier = str(identifier)
        for field, value in (
            ("id", identifier),
            ("image", line.get("image")),
            ("question", question),
        ):
            if not isinstance(value, str) or not value.strip():
                raise InputError(
                    f"{path}, record {number}: `{field}` must be text, got {value!r}.",
                    advice="Every line needs `id`, `image` (one path) and `question`.",
                )
        image = _relative(line["image"], path.parent, base)
        rows.append({"id": identifier, "image": image, "question": question})
    if not rows:
        raise InputError(f"{str(path)!r} holds no picture.", advice="Write one object per line.")
    check_ids(rows, str(path))
    return rows


def from_folder(folder: Path, base: Path, seed: int) -> list[Row]:
    """Records of all pictures in a folder and the folders in it, in the order of their names.

    The identifier is the path within the folder; the question is drawn from `PROMPTS` by the
    seed and the identifier.

    Args:
        folder: The folder.
        base: The folder that the records' paths shall be relative to.
        seed: Decides the questions.

    Raises:
        InputError: If there is no such folder, or no picture in it.
    """
    if not folder.is_dir():
        raise InputError(f"There is no folder {str(folder)!r}.", advice="Check the path.")
    paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
    if not paths:
        raise InputError(
            f"{str(folder)!r} holds no picture.",
            advice=f"Pictures are files that end with {', '.join(sorted(_SUFFIXES))}.",
        )
    rows = []
    for path in paths:
        identifier = path.relative_to(folder).as_posix()
        image = _relative(str(path), Path(), base)
        question = _question(PROMPTS, seed, identifier)
        rows.append({"id": identifier, "image": image, "question": question})
    return rows


def _relative(image: str, folder: Path, base: Path) -> str:
    if "://" in image:
        return image  # no file: it is refused when it is read, by this name
    return Path(os.path.relpath(folder / image, base)).as_posix()


def _question(questions: Sequence[str], seed: int, identifier: str) -> str:
    position = choose(range(len(questions)), seed, identifier, "question")
    return questions[position or 0]


def world_records(name: str, count: int, seed: int) -> list[Row]:
    """Records of the pictures that `export_world` writes.

    Args:
        name: Name of the world's folder, within the folder that paths are relative to.
        count: Number of pictures.
        seed: Decides the questions, drawn from the world's own.
    """
    rows = []
    for index in range(count):
        file = file_name(index)
        identifier = file.partition(".")[0]
        question = _question(CAPTION_QUESTIONS, seed, identifier)
        rows.append({"id": identifier, "image": f"{name}/images/{file}", "question": question})
    return rows


def export_world(
    folder: Path,
    split: str,
    count: int,
    seed: int,
    *,
    overwrite: bool = False,
    progress: bool = False,
) -> None:
    """Writes the pictures of a world with their truth, unless they are there.

    Several shards may call this at once: the first writes, the others wait.

    Args:
        folder: Where; see `data_tools.world.export`.
        split: Kind of world.
        count: Number of pictures.
        seed: Of the pictures.
        overwrite: Replace another world in the folder.
        progress: Show a progress bar on standard error.

    Raises:
        InputError: If an argument is out of range, or the folder holds something else.
    """
    # A world that begins elsewhere says so in "first".
    wanted = {"split": split, "count": count, "seed": seed, "first": None}
    with locked(folder):
        there = _world_request(folder)
        same = there is not None and all(there.get(key) == value for key, value in wanted.items())
        if same and (folder / "instances.json").is_file():  # the file written last
            return
        if there is not None and not same and overwrite:
            shutil.rmtree(folder)
        write_split(folder, split, count, seed, progress=progress)


def _world_request(folder: Path) -> dict[str, Any] | None:
    path = folder / RUN_RECORD
    if not path.is_file():
        return None
    request: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return request


def records_hash(rows: Sequence[Mapping[str, Any]]) -> str:
    """Hash of what is asked about which pictures, whatever their order: a fact of the run."""
    digest = hashlib.sha256()
    for row in sorted(rows, key=lambda row: str(row["id"])):
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return f"sha256:{digest.hexdigest()}"
