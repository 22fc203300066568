"""COCO annotation files, and what mmlm ships of them: truth for CHAIR, object lists for POPE."""

from __future__ import annotations

import io
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.base import read_json
from mmlm.errors import InputError
from mmlm.language.objects import Variant, check_variant, node_of_word, node_words
from mmlm.language.tables import load_table

if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = [
    "Picture",
    "read_instances",
    "read_references",
    "subset_ids",
    "truth_from_coco",
    "truth_of_val2014",
]


class Picture(NamedTuple):
    """A picture of an instances file.

    Attributes:
        image_id: Its COCO id.
        file_name: Its file, relative to the folder of pictures.
        objects: Distinct object names in the order of the annotations.
    """

    image_id: int
    file_name: str
    objects: tuple[str, ...]


def read_instances(path: str | Path) -> list[Picture]:
    """Reads an ``instances*.json`` in COCO format.

    Returns:
        The pictures in the order of the file, also those without any object.

    Raises:
        InputError: If the file cannot be read, is not in COCO format, or has an object that is not
            one of COCO's 80.
    """
    data = _coco(path, {"images": "id", "categories": "name", "annotations": "category_id"})
    names = {entry["id"]: str(entry["name"]) for entry in data["categories"]}
    nodes = node_of_word()
    if foreign := sorted(set(names.values()) - set(nodes)):
        raise InputError(
            f"{path}: the scorers know COCO's 80 objects only; it has {foreign[0]!r}.",
            advice="Rename the categories to COCO's names or remove them.",
        )
    files = {int(image["id"]): str(image.get("file_name", "")) for image in data["images"]}
    # A dictionary keeps the order of the annotations, a set would not.
    objects: dict[int, dict[str, None]] = {image: {} for image in files}
    for annotation in data["annotations"]:
        category = annotation["category_id"]
        if category not in names:
            raise InputError(
                f"{path}: category_id {category!r} is not among its categories.",
                advice="The file is damaged; fetch it again.",
            )
        objects.setdefault(int(annotation["image_id"]), {})[nodes[names[category]]] = None
    return [Picture(image, files.get(image, ""), tuple(found)) for image, found in objects.items()]


def read_references(path: str | Path) -> list[tuple[int, str]]:
    """Reads a ``captions*.json`` in COCO format: image id and reference caption.

    Raises:
        InputError: If the file cannot be read or is not in COCO format.
    """
    rows = _coco(path, {"annotations": "caption"})["annotations"]
    return [(int(row["image_id"]), str(row["caption"])) for row in rows]


def truth_from_coco(
    instances: str | Path | Sequence[str | Path],
    captions: str | Path | Sequence[str | Path] = (),
    variant: Variant = "wordnet",
) -> dict[int, set[str]]:
    """Objects of each picture: instance categories, and objects named in reference captions.

    Args:
        instances: One or more ``instances*.json`` in COCO format.
        captions: None, one or more ``captions*.json`` in COCO format.
        variant: Word procedure for the reference captions.

    Returns:
        Image id -> COCO names; pictures without any object are in it with an empty set.

    Raises:
        InputError: If a file cannot be read, is not in COCO format, or has an object that is not
            one of COCO's 80.
    """
    check_variant(variant)
    truth: dict[int, set[str]] = {}
    for path in _paths(instances):
        for picture in read_instances(path):
            truth.setdefault(picture.image_id, set()).update(picture.objects)
    for path in _paths(captions):
        for image, caption in read_references(path):
            truth.setdefault(image, set()).update(node_words(caption, variant))
    return truth


def truth_of_val2014() -> dict[int, set[str]]:
    """Objects of all 40,504 pictures of COCO val2014, from the table that ships with mmlm.

    Instances and the five reference captions, as in the evaluator cache that goes with the
    released scorers (caption words by ``pattern``); published LVLM numbers use it with captions
    scored by ``wordnet``.
    """
    import numpy as np

    raw = resources.files("benchmarks").joinpath("data", "coco_val2014_objects.npz").read_bytes()
    with np.load(io.BytesIO(raw)) as table:
        names = [str(name) for name in table["object_names"]]
        bits = np.unpackbits(table["object_bits"], axis=1, bitorder="little", count=len(names))
        return {
            int(image): {names[column] for column in row.nonzero()[0]}
            for image, row in zip(table["image_ids"], bits, strict=True)
        }


def subset_ids(name: str) -> list[int]:
    """Image ids of a named subset of COCO val2014.

    Args:
        name: ``opera500``: the pictures of LLaVA-1.5's released captions in the OPERA repository.

    Raises:
        InputError: If there is no such subset.
    """
    if name != "opera500":
        raise InputError(f"There is no subset {name!r}.", advice="There is: opera500.")
    return [int(image) for image in load_table("opera500.json", "benchmarks")]


def _coco(path: str | Path, tables: dict[str, str]) -> dict[str, Any]:
    """Reads a COCO file and checks that each named table is a list of rows with the named field."""
    data = read_json(path)
    for table, field in tables.items():
        rows = data.get(table) if isinstance(data, dict) else None
        if not isinstance(rows, list):
            raise InputError(
                f"{path} is not in COCO format: it has no list {table!r}.",
                advice="Give an instances*.json or captions*.json file.",
            )
        for number, row in enumerate(rows):
            needed = (field, "image_id") if table == "annotations" else (field,)
            if missing := [key for key in needed if not isinstance(row, dict) or key not in row]:
                raise InputError(
                    f"{path}: {table}[{number}] has no {missing[0]!r}.",
                    advice="Give an instances*.json or captions*.json file.",
                )
    return data


def _paths(paths: str | Path | Sequence[str | Path]) -> Sequence[str | Path]:
    return [paths] if isinstance(paths, str | Path) else paths
