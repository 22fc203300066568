"""SENTINEL: pairs of sentences from a model's own captions (arXiv 2507.12455).

For every picture, again and again: sample the next sentence several times, look up the objects that
the samples name with two detectors, pair samples without absent objects with samples that have
some, and let one of the former extend the caption.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from data_tools.detectors import Detector
from data_tools.generators import GeneratorError, SentenceGenerator
from data_tools.pictures import Picture
from data_tools.records import Outcome
from data_tools.sentinel.asking import Witnesses
from data_tools.sentinel.captions import Caption
from data_tools.sentinel.objects import ObjectExtractor
from data_tools.sentinel.objects.objectless import ObjectlessShare
from data_tools.sentinel.objects.pronouns import Coreference
from data_tools.sentinel.pairs import is_finished, n_empty, unique_sentences
from data_tools.sentinel.reading import SentenceReader
from data_tools.sentinel.records import unreadable_line
from data_tools.sentinel.settings import SentinelSettings
from data_tools.stages import Record
from mmlm.errors import ImageReadError

__all__ = ["SentinelPipeline"]

_log = logging.getLogger(__name__)


class SentinelPipeline:
    """The whole of SENTINEL as one stage.

    Several pictures are worked on at once, and when the caption of one is complete the next takes
    its place. What comes out for a picture depends on the picture, its id and question, and the
    settings only.

    Args:
        generator: Samples sentences; loaded.
        extractor: Finds the objects that sentences name.
        detectors: Say whether they are there; loaded.
        settings: All numbers and rules.
        coreference: Names what pronouns stand for, so that their objects are found; the sentences
            themselves stay as the model wrote them.
        folder: What the records' paths are relative to.
        images_at_once: Pictures that are sampled together; does not change any result.
        strict: Stop at the first picture that cannot be read.

    Attributes:
        kinds: Its lines: pairs for training, and the audit.

    Raises:
        ValueError: If ``images_at_once`` is less than 1, there is no detector, or ``cross_check``
            names one that is not there.
    """

    kinds: tuple[str, ...] = ("pairs", "images")

    def __init__(
        self,
        generator: SentenceGenerator,
        extractor: ObjectExtractor,
        detectors: Sequence[Detector],
        settings: SentinelSettings | None = None,
        *,
        coreference: Coreference | None = None,
        folder: Path = Path(),
        images_at_once: int = 8,
        strict: bool = False,
    ) -> None:
        if images_at_once < 1:
            raise ValueError(f"images_at_once must be at least 1, got {images_at_once}")
        self.settings = settings or SentinelSettings()
        self._generator = generator
        self._extractor = extractor
        self._witnesses = Witnesses(detectors, self.settings)
        self._reader = SentenceReader(
            extractor, pronouns=self.settings.drop_pronouns, coreference=coreference
        )
        self._objectless = ObjectlessShare()
        self._folder = folder
        self._images_at_once = images_at_once
        self._strict = strict
        self._meta: Mapping[str, Any] | None = None

    @property
    def facts(self) -> dict[str, Any]:
        """What is known of generator, extractor and detectors after loading, for ``run.json``."""
        return {
            "generator": dict(self._generator.facts),
            "extractor": dict(self._extractor.facts),
            "detectors": self._witnesses.facts,
            "out_of_vocabulary": self._witnesses.out_of_vocabulary,
        }

    def process(self, records: Iterable[Record]) -> Iterator[Outcome]:
        """Works on pictures.

        Args:
            records: ``id``, ``image`` (path, relative to the folder) and ``question``.

        Yields:
            One outcome per picture, in the order in which they are finished.

        Raises:
            ImageReadError: If a picture cannot be read, in strict mode.
        """
        waiting = iter(records)
        active: list[Caption] = []
        while True:
            yield from self._fill(active, waiting)
            if not active:
                return
            started = time.perf_counter()
            self._step(active)
            share = (time.perf_counter() - started) / len(active)
            for caption in active:
                caption.seconds += share
            complete = [caption for caption in active if caption.complete]
            self._generator.forget([caption.picture for caption in complete])
            active[:] = [caption for caption in active if not caption.complete]
            for caption in complete:
                if remark := self._objectless.add(caption.mentions):
                    _log.warning("%s", remark)
                yield caption.outcome()

    def watch(self, record: Record) -> Iterator[Outcome]:
        """Works on one picture, for people who want to see how.

        Args:
            record: As for `process`.

        Yields:
            What is known after each sentence; the last outcome is the one that `process` gives.

        Raises:
            ImageReadError: If the picture cannot be read, in strict mode.
        """
        caption = self._open(record)
        if not isinstance(caption, Caption):
            yield Outcome(record["id"], caption["status"], {"images": [caption]})
            return
        try:
            while not caption.complete:
                started = time.perf_counter()
                self._step([caption])
                caption.seconds += time.perf_counter() - started
                yield caption.outcome()
        finally:
            self._generator.forget([caption.picture])

    def _fill(self, active: list[Caption], waiting: Iterator[Record]) -> Iterator[Outcome]:
        while len(active) < self._images_at_once and (record := next(waiting, None)):
            started = time.perf_counter()
            caption = self._open(record)
            seconds = time.perf_counter() - started
            if isinstance(caption, Caption):
                caption.seconds = seconds
                active.append(caption)
            else:
                yield Outcome(record["id"], caption["status"], {"images": [caption]}, seconds)

    def _open(self, record: Record) -> Caption | dict[str, Any]:
        image, question = record["image"], record["question"]
        try:
            picture = Picture.read(record["id"], self._folder / image)
        except ImageReadError as error:
            if self._strict:
                raise
            _log.warning("%s", error)
            return unreadable_line(record["id"], image=image, question=question, error=str(error))
        if self._meta is None:
            self._meta = self._make_meta()
        return Caption(picture, image, question, self.settings, self._meta)

    def _step(self, active: Sequence[Caption]) -> None:
        """Takes every caption one sentence further."""
        requests = [caption.request for caption in active]
        answers = self._generator.sample_sentences(
            requests, self.settings.n, self.settings.temperature
        )
        drawn = []
        for caption, answer in zip(active, answers, strict=True):
            if isinstance(answer, GeneratorError):
                caption.fail(str(answer))
            elif is_finished(answer, self.settings.finish_rule):
                caption.end(n_empty(answer))
            else:
                drawn.append((caption, unique_sentences(answer), n_empty(answer)))
        readings = iter(
            self._reader.read(
                [(caption.last, one.text) for caption, found, _ in drawn for one in found]
            )
        )
        for caption, found, ended in drawn:
            own = list(itertools.islice(readings, len(found)))
            caption.advance(found, own, ended, self._witnesses)

    def _make_meta(self) -> dict[str, Any]:
        import mmlm

        facts = self._generator.facts
        return {
            "model": facts.get("model"),
            "model_rev": facts.get("weights"),
            "processor_hash": facts.get("processor"),
            "seed": self.settings.seed,
            "detectors": self._witnesses.texts,
            "thresholds": self._witnesses.thresholds,
            "extractor": self._extractor.facts.get("name"),
            "version": mmlm.__version__,
        }
