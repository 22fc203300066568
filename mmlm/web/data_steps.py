"""SENTINEL on one picture, sentence by sentence, for those who watch.

The pipeline is the one of `mmlm data sentinel`; here it gets one picture: a drawn scene, which the
world's own detectors know, or an upload, about which the visitor says what is to be seen.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Protocol

from mmlm.errors import InputError

if TYPE_CHECKING:
    from data_tools.detectors import Detector
    from data_tools.records import Outcome
    from data_tools.sentinel.settings import SentinelSettings

__all__ = ["DrawnScene", "Subject", "Upload", "Watch", "check"]

_SENTENCE_TOKENS = 64
"""Longest sentence; a sample that has not ended by then is none."""
_MOST = {"n": 20, "max_sentences": 16}
_ID = "picture"


class Subject(Protocol):
    """The picture that is worked on, and who says what is in it."""

    def place(self, folder: Path) -> str:
        """Puts the picture into a folder, if it is in no file yet; its path from there."""

    def detectors(self) -> tuple[Detector, ...]:
        """Those who say what is there, not loaded."""


@dataclass(frozen=True)
class DrawnScene:
    """A scene of the embedded world.

    Attributes:
        number: Number of the scene, as in the compare tab; not negative.
        errors: Two detectors each overlook an object, or see an absent one, with this
            probability, 0 to 0.5; with 0 one detector knows the truth.
        split: Kind of scenes.
    """

    number: int = 0
    errors: float = 0.0
    split: str = "natural"

    def __post_init__(self) -> None:
        """Refuses numbers out of range.

        Raises:
            InputError: Says what is allowed.
        """
        if self.number < 0:
            raise InputError(f"The scene is {self.number}.", advice="Give a number of 0 or more.")
        if not 0 <= self.errors <= 0.5:
            raise InputError(
                f"The detectors' errors are {self.errors}.", advice="Give a share from 0 to 0.5."
            )

    def place(self, folder: Path) -> str:
        """Writes the scene with its truth, as `mmlm data world` does."""
        from data_tools.world.export import file_name, write_split

        write_split(folder / "world", self.split, 1, progress=False, first=self.number)
        return f"world/images/{file_name(self.number)}"

    def detectors(self) -> tuple[Detector, ...]:
        """The truth, or two that err in different places."""
        from data_tools.detectors.world import WorldTruth

        if not self.errors:
            return (WorldTruth(),)
        return tuple(
            WorldTruth(misses=self.errors, false_alarms=self.errors, seed=seed) for seed in (1, 2)
        )


@dataclass(frozen=True)
class Upload:
    """A visitor's picture.

    Attributes:
        path: The file.
        seen: Names of what the visitor sees in it; empty if they do not say.
        detector: The playground's own; None if it has none.
    """

    path: Path
    seen: tuple[str, ...] = ()
    detector: Detector | None = None

    def __post_init__(self) -> None:
        """Refuses a picture about which nobody can say anything.

        Raises:
            InputError: Says what to do.
        """
        if not self.seen and self.detector is None:
            raise InputError(
                "Nobody says what is in your picture.",
                advice="Write what you see, e.g. dog, ball, tree; or choose a drawn scene.",
            )

    def place(self, folder: Path) -> str:
        """The picture stays where it is."""
        return str(self.path.absolute())

    def detectors(self) -> tuple[Detector, ...]:
        """The visitor, and the playground's detector."""
        from data_tools.detectors.scripted import ScriptedDetector

        found: list[Detector] = []
        if self.seen:
            found.append(ScriptedDetector(findings={_ID: self.seen}, name="you"))
        if self.detector is not None:
            found.append(self.detector)
        return tuple(found)


def check(question: str, settings: SentinelSettings) -> None:
    """Refuses what cannot be asked, and what would keep all visitors waiting.

    Args:
        question: What the user of the model asks.
        settings: Numbers and rules of SENTINEL.

    Raises:
        InputError: Says what is allowed.
    """
    if not question.strip():
        raise InputError("The question is empty.", advice="Ask, e.g.: describe the image .")
    for name, most in _MOST.items():
        if (given := getattr(settings, name)) > most:
            raise InputError(
                f"{name} is {given}.",
                advice=f"Give at most {most} here; `mmlm data sentinel` takes any number.",
            )


class Watch:
    """A picture that is worked on, step by step.

    Nothing is sampled before the first `step`.

    Args:
        subject: The picture, and who says what is in it.
        question: What the user of the model asks.
        settings: Numbers and rules of SENTINEL.
        model: A vision-language model that nobody else uses while this lives.
        processor: Its processor.

    Attributes:
        detectors: Names of those who say what is there.
        folder: What paths in the lines are relative to.
        complete: Whether no step is left.

    Raises:
        MmlmError: If the question, the picture, the detectors or the model cannot be used.
    """

    def __init__(
        self,
        subject: Subject,
        question: str,
        settings: SentinelSettings,
        model: Any,
        processor: Any,
    ) -> None:
        from data_tools.sentinel.asking import Witnesses

        check(question, settings)
        self.complete = False
        self._settings = settings
        self._outcome: Outcome | None = None
        detectors = subject.detectors()
        self.detectors = Witnesses(detectors, settings).names
        with ExitStack() as undo:
            folder = undo.enter_context(TemporaryDirectory(prefix="mmlm-data-"))
            self.folder = Path(folder)
            record = {"id": _ID, "image": subject.place(self.folder), "question": question.strip()}
            self._steps = self._begin(record, detectors, model, processor)
            self._rest = undo.pop_all()

    def _begin(
        self,
        record: Mapping[str, Any],
        detectors: tuple[Detector, ...],
        model: Any,
        processor: Any,
    ) -> Iterator[Outcome]:
        from data_tools.generators.huggingface import HFGenerator
        from data_tools.sentinel.objects.make import make_extractor
        from data_tools.sentinel.pipeline import SentinelPipeline

        for detector in detectors:
            detector.load()
        pipeline = SentinelPipeline(
            HFGenerator(model, processor, max_new_tokens=_SENTENCE_TOKENS),
            make_extractor(),
            detectors,
            self._settings,
            folder=self.folder,
            strict=True,
        )
        return pipeline.watch(record)

    @property
    def image(self) -> Mapping[str, Any]:
        """The audit so far, a line of ``images.jsonl``; empty before the first step."""
        return self._outcome.lines["images"][0] if self._outcome else {}

    @property
    def pairs(self) -> list[Mapping[str, Any]]:
        """The pairs so far, lines of ``pairs.jsonl``."""
        return list(self._outcome.lines["pairs"]) if self._outcome else []

    def step(self) -> None:
        """Samples, labels and pairs one more sentence; does nothing when all is complete.

        Raises:
            ImageReadError: If the picture cannot be read.
        """
        outcome = next(self._steps, None)
        if outcome is None:
            self.complete = True
            return
        self._outcome = outcome
        image = self.image
        self.complete = (
            image["status"] == "model_error"
            or image["steps"][-1]["next"] is None
            or image["n_sentences"] >= self._settings.max_sentences
        )

    def close(self) -> None:
        """Frees what the model keeps of the picture, and the folder."""
        self._steps.close()  # type: ignore[attr-defined]  # a generator
        self._rest.close()
        self.complete = True
