"""Detectors: which of some named objects are in a picture, and where.

A detector is a frozen dataclass, written like a method: ``HFDetector(model="path")``. Its fields
are its settings; weights are loaded by `Detector.load`, before a run begins.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from data_tools.pictures import Picture
from mmlm.text_form import parse_part

__all__ = ["DETECTORS", "Box", "Detector", "Finding", "parse_detector"]

DETECTORS = {
    "GroundingDINO": "data_tools.detectors.groundingdino:GroundingDINO",
    "HFDetector": "data_tools.detectors.huggingface:HFDetector",
    "WorldTruth": "data_tools.detectors.world:WorldTruth",
}
"""The detectors that ship with mmlm."""


@dataclass(frozen=True)
class Box:
    """A place in a picture.

    Attributes:
        left: In pixels of the picture, from its left edge.
        top: From its upper edge.
        right: Exclusive.
        bottom: Exclusive.
        score: The detector's confidence, 0 to 1.
        label: What the detector calls it.
    """

    left: float
    top: float
    right: float
    bottom: float
    score: float
    label: str


@dataclass(frozen=True)
class Finding:
    """What a detector says about one name.

    Attributes:
        accepted: Whether the object is there, by the detector's own thresholds.
        score: Confidence of the best box; None if there is none.
        boxes: Where it is, best first; empty if it was not found.
    """

    accepted: bool
    score: float | None = None
    boxes: tuple[Box, ...] = ()


class Detector(ABC):
    """Finds named objects in pictures."""

    @property
    def name(self) -> str:
        """Short name in records: the class's."""
        return type(self).__name__

    @property
    def vocabulary(self) -> frozenset[str] | None:
        """The only names it knows, or None if any name may be asked (open vocabulary)."""
        return None

    @property
    @abstractmethod
    def facts(self) -> Mapping[str, Any]:
        """What determines its findings (weights, thresholds), as JSON values; after `load`."""

    def load(self) -> None:
        """Loads weights or tables, once; refuses what cannot work before any picture is read.

        Raises:
            InputError: If files are missing or damaged.
        """

    @abstractmethod
    def detect(self, picture: Picture, names: Sequence[str]) -> dict[str, Finding | None]:
        """Looks for objects.

        Args:
            picture: The picture.
            names: Lower-case names, singular, each once; of any number.

        Returns:
            A finding for every name; None for one outside the vocabulary.
        """


def parse_detector(text: str) -> Detector:
    """Turns ``HFDetector(model="path")`` into the detector.

    Raises:
        InputError: If the text is no such call, or the name or a parameter is wrong.
    """
    return parse_part(text, DETECTORS, "detector")
