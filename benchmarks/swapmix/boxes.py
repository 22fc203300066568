"""Objects with boxes from a file in COCO format."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.base import read_json
from benchmarks.coco import read_instances
from mmlm.errors import InputError
from mmlm.language.objects import node_of_word

if TYPE_CHECKING:
    from benchmarks.swapmix.regions import Box

__all__ = ["Thing", "read_things"]


class Thing(NamedTuple):
    """One object of a picture."""

    name: str
    group: str
    """Its supercategory: classes of one group are near each other."""
    box: Box
    crowd: bool = False
    """Whether the box holds many of the class; then nobody has counted them."""


def read_things(path: str | Path) -> dict[int, tuple[Thing, ...]]:
    """The objects of every picture, by its id, in the order of the file.

    Args:
        path: An ``instances*.json`` in COCO format.

    Raises:
        InputError: If the file cannot be read, is not in COCO format, or lacks a box, a size or a
            supercategory.
    """
    found: dict[int, list[Thing]] = {p.image_id: [] for p in read_instances(path)}  # checks it
    data = read_json(path)
    nodes = node_of_word()
    sizes = {image["id"]: _pair(image, ("width", "height"), path) for image in data["images"]}
    kinds = {entry["id"]: entry for entry in data["categories"]}
    for annotation in data["annotations"]:
        kind = kinds[annotation["category_id"]]
        if "supercategory" not in kind:
            raise InputError(
                f"{path}: the category {kind['name']!r} has no 'supercategory'.",
                advice="Give COCO's own instances file: it says which classes are near each other.",
            )
        width, height = sizes[annotation["image_id"]]
        x, y, w, h = _box(annotation, path)
        thing = Thing(
            nodes[str(kind["name"])],
            str(kind["supercategory"]),
            (x / width, y / height, w / width, h / height),
            bool(annotation.get("iscrowd")),
        )
        found[int(annotation["image_id"])].append(thing)
    return {image: tuple(things) for image, things in found.items()}


def _pair(record: dict[str, Any], names: tuple[str, str], path: str | Path) -> tuple[float, float]:
    values = [record.get(name) for name in names]
    if not all(isinstance(value, int | float) and value > 0 for value in values):
        raise InputError(
            f"{path}: the picture {record.get('id')!r} has no {' and '.join(names)}.",
            advice="Boxes are in pixels, so the size of every picture is needed.",
        )
    return values[0], values[1]  # type: ignore[return-value]


def _box(annotation: dict[str, Any], path: str | Path) -> list[float]:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4:
        raise InputError(
            f"{path}: an annotation of picture {annotation['image_id']} has the 'bbox' {box!r}.",
            advice="Every object needs [x, y, width, height] in pixels.",
        )
    return [float(part) for part in box]
