"""The embedded world's own truth as a detector, with errors at will.

Two real detectors err on different pictures; that is why SENTINEL asks two. `WorldTruth` plays
that part where every picture's content is known: each seed errs in its own places, equally in
every run.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from data_tools.detectors import Box, Detector, Finding
from data_tools.detectors.matching import class_of
from data_tools.pictures import Picture
from data_tools.world.categories import LONG_SIDE, NAMES, size_group
from data_tools.world.export import RUN_RECORD
from data_tools.world.themes import theme_classes
from mmlm.errors import InputError

__all__ = ["WorldTruth"]

_VOCABULARY = frozenset(NAMES)
_PICTURE_SIDE = 80  # what LONG_SIDE refers to


@dataclass(frozen=True, kw_only=True)
class WorldTruth(Detector):
    """Knows what is in the pictures that ``mmlm data world`` exported.

    A picture is looked up in the folder it lies in (``FOLDER/images/000001.png`` in
    ``FOLDER/instances.json``). Names are COCO objects or words for them ("puppy"); every other
    name is outside the vocabulary. An error depends on the seed, the picture and the object alone,
    so a larger rate only adds errors to those of a smaller one.

    Attributes:
        misses: Probability that an object of the picture is not seen, 0 to 1.
        false_alarms: Probability that an absent object is seen, 0 to 1.
        typical_only: False alarms only for objects that are usual in the picture's theme, as a
            real detector's prior would have it.
        seed: Two detectors with different seeds err independently; not negative.
    """

    misses: float = 0.0
    false_alarms: float = 0.0
    typical_only: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Refuses values that are no probabilities."""
        for field in ("misses", "false_alarms"):
            value = getattr(self, field)
            if not 0.0 <= value <= 1.0:
                raise ValueError(f"{field} must be within 0 and 1, got {value}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")

    @property
    def name(self) -> str:
        """``WorldTruth``, with the seed if there are errors: then two of them differ."""
        exact = self.misses == self.false_alarms == 0.0
        return "WorldTruth" if exact else f"WorldTruth-{self.seed}"

    @property
    def vocabulary(self) -> frozenset[str]:
        """COCO's 80 objects."""
        return _VOCABULARY

    @property
    def facts(self) -> Mapping[str, Any]:
        """Its rates and its seed."""
        return {
            "detector": "WorldTruth",
            "misses": self.misses,
            "false_alarms": self.false_alarms,
            "typical_only": self.typical_only,
            "seed": self.seed,
        }

    def detect(self, picture: Picture, names: Sequence[str]) -> dict[str, Finding | None]:
        """Looks the names up in the truth.

        Raises:
            InputError: If the picture is not of an exported world.
        """
        truth = _truth(picture)
        findings: dict[str, Finding | None] = {}
        for name in names:
            known = class_of(name, self.vocabulary)
            findings[name] = None if known is None else self._look(picture, truth, known)
        return findings

    def _look(self, picture: Picture, truth: _Truth, known: str) -> Finding:
        draws = _Draws(f"{self.seed}\0{picture.sha256}\0{known}")
        boxes = truth.boxes.get(known, ())
        if boxes:
            seen = draws.next() >= self.misses
        elif self.typical_only and known not in theme_classes(truth.theme):
            seen = False
        elif seen := draws.next() < self.false_alarms:
            boxes = (_invented(draws, truth, known),)
        if not seen:
            return Finding(accepted=False)
        return Finding(True, 1.0, tuple(Box(*box, score=1.0, label=known) for box in boxes))


class _Truth(NamedTuple):
    width: int
    height: int
    theme: str
    boxes: dict[str, tuple[tuple[float, float, float, float], ...]]


class _Draws:
    """Uniform numbers that depend on a text alone, in every process and on every machine."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._count = 0

    def next(self) -> float:
        self._count += 1
        text = f"{self._text}\0{self._count}".encode()
        return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") / 2.0**64


def _invented(draws: _Draws, truth: _Truth, known: str) -> tuple[float, float, float, float]:
    """A box of a usual size for the object, anywhere in the picture."""
    low, high = LONG_SIDE[size_group(known)]
    scale = min(truth.width, truth.height) / _PICTURE_SIDE
    side = (low + draws.next() * (high - low)) * scale
    left = draws.next() * (truth.width - side)
    top = draws.next() * (truth.height - side)
    return tuple(round(value, 1) for value in (left, top, left + side, top + side))  # type: ignore[return-value]


def _truth(picture: Picture) -> _Truth:
    folder = picture.path.absolute().parent.parent
    truth = _exported(folder).get(picture.path.name)
    if truth is None or truth[:2] != picture.image.size:
        what = "is not one of the world" if truth is None else "has not the size of the one"
        raise InputError(
            f"The picture {str(picture.path)!r} {what} in {str(folder)!r}.",
            advice="Leave the pictures of `mmlm data world` where and as it wrote them.",
        )
    return truth


@functools.lru_cache(maxsize=8)
def _exported(folder: Path) -> dict[str, _Truth]:
    """The truth about every picture of an exported world, by file name."""
    path = folder / "instances.json"
    if not (folder / RUN_RECORD).is_file() or not path.is_file():
        raise InputError(
            f"{str(folder)!r} holds no world ({RUN_RECORD} and {path.name}); WorldTruth knows "
            "pictures of exported worlds only.",
            advice="Make pictures with `mmlm data world`, or use another detector.",
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        names = {one["id"]: one["name"] for one in content["categories"]}
        boxes: dict[int, dict[str, list[tuple[float, float, float, float]]]] = {}
        for one in content["annotations"]:
            left, top, width, height = one["bbox"]
            own = boxes.setdefault(one["image_id"], {}).setdefault(names[one["category_id"]], [])
            own.append((left, top, left + width, top + height))
        return {
            image["file_name"]: _Truth(
                image["width"],
                image["height"],
                image["theme"],
                {name: tuple(own) for name, own in boxes.get(image["id"], {}).items()},
            )
            for image in content["images"]
        }
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{str(path)!r} is damaged: {error!r}.",
            advice="Write the world again: the same `mmlm data world` restores its files.",
        ) from error
