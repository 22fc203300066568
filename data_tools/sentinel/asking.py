"""Detectors as one witness: names that are unique, failures that cost a picture and not the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from data_tools.detectors import Detector, Finding
from data_tools.detectors.cache import CachedDetector
from data_tools.pictures import Picture
from data_tools.sentinel.labels import OutOfVocabulary, detectors_asked
from data_tools.sentinel.settings import SentinelSettings

__all__ = ["Answers", "Witnesses"]

# What libraries raise on a picture or a list of names that they cannot take; running out of GPU
# memory is a RuntimeError. What concerns every picture still ends the run: mistakes in the code
# (TypeError), a full disk (OSError), pictures that a detector was never meant for (InputError).
_FAILURES = (RuntimeError, ValueError, ArithmeticError, LookupError, MemoryError)


@dataclass
class Answers:
    """What the detectors said about names.

    Attributes:
        findings: By detector, then by name; a name is missing where its detector failed.
        failures: Names that some detector failed on.
        errors: Why, once per detector.
    """

    findings: dict[str, dict[str, Finding | None]] = field(default_factory=dict)
    failures: int = 0
    errors: list[str] = field(default_factory=list)


class Witnesses:
    """The detectors that a policy needs.

    Args:
        detectors: All of the run; two of one name are told apart: ``HFDetector``,
            ``HFDetector#2``.
        settings: Names the policy.

    Attributes:
        names: Names of all detectors, in order.

    Raises:
        ValueError: If there is no detector, or the policy names another.
    """

    def __init__(self, detectors: Sequence[Detector], settings: SentinelSettings) -> None:
        if not detectors:
            raise ValueError("detectors must hold at least one detector")
        self._detectors: dict[str, Detector] = {}
        for detector in detectors:
            same = sum(detector.name == other.name for other in self._detectors.values())
            name = f"{detector.name}#{same + 1}" if same else detector.name
            self._detectors[name] = detector
        self.names = tuple(self._detectors)
        self.policy = settings.cross_check
        self._asked = detectors_asked(self.policy, self.names)
        self.out_of_vocabulary = self._rule(settings)

    def _rule(self, settings: SentinelSettings) -> OutOfVocabulary:
        if settings.out_of_vocabulary != "auto":
            return settings.out_of_vocabulary
        open_one = any(self._detectors[name].vocabulary is None for name in self._asked)
        return "abstain" if open_one else "accept"

    @property
    def facts(self) -> dict[str, Any]:
        """What determines the findings, by detector."""
        return {name: dict(detector.facts) for name, detector in self._detectors.items()}

    @property
    def texts(self) -> list[str]:
        """The detectors' text forms; where findings are cached does not belong to them."""
        return [
            repr(detector.inner if isinstance(detector, CachedDetector) else detector)
            for detector in self._detectors.values()
        ]

    @property
    def thresholds(self) -> dict[str, Mapping[str, Any]]:
        """The settings among their facts whose names say threshold, by detector."""
        return {
            name: {key: value for key, value in facts.items() if "threshold" in key}
            for name, facts in self.facts.items()
        }

    def ask(self, picture: Picture, names: Sequence[str]) -> Answers:
        """Asks every detector about names that are new in a picture.

        A call that fails is repeated once in two halves; what fails again is left out.
        """
        answers = Answers()
        failed: set[str] = set()
        for detector_name in self._asked:
            detector = self._detectors[detector_name]
            found, error = _ask_one(detector, picture, names)
            answers.findings[detector_name] = found
            failed |= set(names) - found.keys()
            if error:
                answers.errors.append(f"{detector_name}: {error}")
        answers.failures = len(failed)
        return answers


def _ask_one(
    detector: Detector, picture: Picture, names: Sequence[str]
) -> tuple[dict[str, Finding | None], str]:
    try:
        return dict(detector.detect(picture, names)), ""
    except _FAILURES:
        middle = (len(names) + 1) // 2
    found: dict[str, Finding | None] = {}
    why = ""
    for half in (names[:middle], names[middle:]):
        try:
            found |= detector.detect(picture, half) if half else {}
        except _FAILURES as error:
            why = f"{type(error).__name__}: {error}"
    return found, why
