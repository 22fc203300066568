"""What is known to be in a picture: drawn by us, written in a file, or seen by a detector."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from mmlm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from data_tools.detectors import Detector
    from data_tools.world import Scene

__all__ = ["Drawn", "Known", "by_detector", "draw_scene", "of_file"]


@dataclass(frozen=True)
class Known:
    """What is known about the objects of a picture.

    Attributes:
        objects: COCO names of objects that are in the picture.
        source: Where this comes from, for people: "the scene as it was drawn", a file's name, a
            detector's.
        asked: Objects about which something is known at all; None if `objects` is complete, so
            that every other object is known to be absent.
    """

    objects: frozenset[str]
    source: str
    asked: frozenset[str] | None = None


class Drawn(NamedTuple):
    """A picture of the embedded world, with its truth."""

    image: Image.Image
    known: Known
    scene: Scene


def draw_scene(split: str = "natural", seed: int = 0, index: int = 0) -> Drawn:
    """Draws a scene of the embedded world; the same arguments give the same picture.

    Args:
        split: A key of `data_tools.world.SPLITS`.
        seed: Seed of the split, >= 0.
        index: Number of the scene, >= 0.

    Raises:
        InputError: For an unknown split or a negative number.
    """
    from PIL import Image

    from data_tools.world import SPLITS, render, scene

    if split not in SPLITS:
        raise InputError(
            f"There is no split {split!r} of the world.", advice=f"Choose: {', '.join(SPLITS)}."
        )
    for name, value in {"seed": seed, "index": index}.items():
        if value < 0:
            raise InputError(f"The {name} is {value}.", advice="Give a number of 0 or more.")
    drawn = scene(SPLITS[split], seed, index, split)
    known = Known(frozenset(drawn.classes), "the scene as it was drawn")
    return Drawn(Image.fromarray(render(drawn).image), known, drawn)


def of_file(path: str | Path, annotations: str | Path | None = None) -> Known | None:
    """What files say about a picture.

    Looked for in this order: the annotations given; ``instances.json`` beside the folder in which
    the picture lies, as ``mmlm data world`` writes it; the table of COCO val2014 that ships with
    mmlm, for pictures under their own names.

    Args:
        path: The picture's file; only its name and place are used.
        annotations: An ``instances*.json`` in COCO format.

    Returns:
        What is known; None if no file knows the picture.

    Raises:
        InputError: If the annotations given cannot be read, or do not know the picture.
    """
    from benchmarks.coco import truth_of_val2014

    path = Path(path)
    if annotations is not None:
        if (known := _in_instances(path, Path(annotations))) is None:
            raise InputError(
                f"{str(annotations)!r} has no picture with the file name {path.name!r}.",
                advice="Give the instances.json that describes this picture, or none.",
            )
        return known
    beside = path.parent.parent / "instances.json"
    if path.parent.name == "images" and beside.is_file():
        return _in_instances(path, beside)
    if path.name.startswith("COCO_val2014_") and path.stem[-12:].isdigit():
        objects = truth_of_val2014().get(int(path.stem[-12:]))
        if objects is not None:
            return Known(frozenset(objects), "COCO val2014")
    return None


def _in_instances(path: Path, annotations: Path) -> Known | None:
    from benchmarks.coco import read_instances

    for picture in read_instances(annotations):
        if picture.file_name == path.name:
            return Known(frozenset(picture.objects), annotations.name)
    return None


def by_detector(detector: Detector, path: str | Path, text: str) -> Known:
    """Asks a detector about the objects that an answer names.

    Args:
        detector: Any detector of `data_tools.detectors`, loaded.
        path: The picture's file.
        text: The answer.

    Returns:
        What the detector found, with ``asked`` the named objects inside its vocabulary.

    Raises:
        ImageReadError: If the picture cannot be read.
    """
    from data_tools.pictures import Picture
    from mmlm.language.objects import node_words

    names = tuple(dict.fromkeys(node_words(text)))
    if not names:
        return Known(frozenset(), detector.name, frozenset())
    findings = detector.detect(Picture.read(str(path), Path(path)), names)
    about = {name: finding for name, finding in findings.items() if finding is not None}
    found = frozenset(name for name, finding in about.items() if finding.accepted)
    return Known(found, detector.name, frozenset(about))
