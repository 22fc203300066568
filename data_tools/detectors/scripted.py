"""A detector whose findings are written down: for tests, and for findings made elsewhere."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.detectors import Box, Detector, Finding
from data_tools.detectors.matching import classes_to_findings, labels_to_findings
from data_tools.pictures import Picture

__all__ = ["ScriptedDetector"]


@dataclass(frozen=True)
class ScriptedDetector(Detector):
    """Answers from a table, and fails where it is told to.

    Attributes:
        findings: Labels, or boxes with labels, by the identifier of the picture; a picture that
            is not in it holds nothing.
        vocabulary: The only names it knows, or None for an open vocabulary.
        name: Its name in records.
        substring_match: The authors' rule for labels; see `labels_to_findings`. Without effect on
            a closed vocabulary, whose labels are class names.
        fail_on: Pictures for which it raises RuntimeError.
        memory: By picture, how many names fit into memory at once; with more it raises
            torch.OutOfMemoryError.
        calls: Every call so far: the picture's identifier and the names.
    """

    findings: Mapping[str, Sequence[str | Box]]
    vocabulary: frozenset[str] | None = None
    name: str = "ScriptedDetector"
    substring_match: bool = False
    fail_on: Collection[str] = ()
    memory: Mapping[str, int] = field(default_factory=dict)
    calls: list[tuple[str, tuple[str, ...]]] = field(
        default_factory=list, init=False, repr=False, compare=False
    )

    @property
    def facts(self) -> Mapping[str, Any]:
        """Its table, and how labels are matched."""
        return {
            "detector": self.name,
            "findings": {
                picture: [one.label if isinstance(one, Box) else one for one in labels]
                for picture, labels in self.findings.items()
            },
            "vocabulary": None if self.vocabulary is None else sorted(self.vocabulary),
            "substring_match": self.substring_match,
        }

    def detect(self, picture: Picture, names: Sequence[str]) -> dict[str, Finding | None]:
        """Looks the picture up.

        Raises:
            RuntimeError: If the script says so.
            torch.OutOfMemoryError: If the script says that so many names do not fit.
        """
        self.calls.append((picture.id, tuple(names)))
        if picture.id in self.fail_on:
            raise RuntimeError(f"scripted failure on {picture.id}")
        if len(names) > self.memory.get(picture.id, len(names)):
            import torch

            raise torch.OutOfMemoryError(f"scripted: {len(names)} names do not fit")
        labels = self.findings.get(picture.id, ())
        if self.vocabulary is not None:
            return classes_to_findings(names, labels, self.vocabulary)
        return {**labels_to_findings(names, labels, substring=self.substring_match)}
