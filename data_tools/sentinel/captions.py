"""The caption of one picture as it grows, and what it leaves behind."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from data_tools.generators import SentenceRequest
from data_tools.pictures import Picture
from data_tools.records import Outcome
from data_tools.sentinel.asking import Witnesses
from data_tools.sentinel.labels import Knowledge
from data_tools.sentinel.objects import ObjectMention
from data_tools.sentinel.pairs import (
    Candidate,
    Pair,
    Sentence,
    build_pairs,
    candidates,
    choose,
    may_come_next,
    same_text,
    stable_hash,
)
from data_tools.sentinel.reading import Reading
from data_tools.sentinel.records import Line, image_line, pair_line, step_line
from data_tools.sentinel.settings import SentinelSettings

__all__ = ["Caption"]


class Caption:
    """A caption that grows sentence by sentence.

    Args:
        picture: What is described.
        image: Its path as it shall stand in the lines.
        question: What the user asks.
        settings: Of the run.
        meta: The part of pair lines that is the same in all of them.

    Attributes:
        picture: See above.
        seconds: Time spent on it so far; the pipeline adds to it.
        complete: Whether nothing more is to be done.
        mentions: Objects of every sentence so far, candidates included.
    """

    def __init__(
        self,
        picture: Picture,
        image: str,
        question: str,
        settings: SentinelSettings,
        meta: Mapping[str, Any],
    ) -> None:
        self.picture = picture
        self.seconds = 0.0
        self.complete = False
        self.mentions: list[Sequence[ObjectMention]] = []
        self._image = image
        self._question = question
        self._settings = settings
        self._meta = meta
        self._sentences: list[str] = []
        self._context_objects: dict[str, None] = {}  # a set that keeps its order
        self._knowledge = Knowledge()
        self._pairs: list[Line] = []
        self._steps: list[Line] = []
        self._counts: Counter[str] = Counter()
        self._classes: Counter[str] = Counter()
        self._errors: list[str] = []
        self._broken = False

    @property
    def request(self) -> SentenceRequest:
        """What the generator is asked next."""
        seed = stable_hash(self._settings.seed, self.picture.id, len(self._steps), "samples")
        return SentenceRequest(self.picture, self._question, self._context, seed)

    @property
    def last(self) -> str:
        """Its last sentence; "" at the beginning."""
        return self._sentences[-1] if self._sentences else ""

    @property
    def _context(self) -> str:
        return " ".join(self._sentences)

    def fail(self, reason: str) -> None:
        """Ends it because the generator cannot go on."""
        self._broken = self.complete = True
        self._errors.append(reason)

    def end(self, ended: int) -> None:
        """Ends it because the model did, in so many samples."""
        self._steps.append(step_line([], {}, ended=ended, chosen_next=None))
        self.complete = True

    def advance(
        self,
        sentences: Sequence[Sentence],
        readings: Sequence[Reading],
        ended: int,
        witnesses: Witnesses,
    ) -> None:
        """Labels and pairs the sentences of a step, and appends one of them.

        Args:
            sentences: The different ones that were sampled.
            readings: What each says.
            ended: Number of empty samples.
            witnesses: The detectors.
        """
        self.mentions += [reading.mentions for reading in readings]
        self._ask([mention for reading in readings for mention in reading.mentions], witnesses)
        found = candidates(
            sentences,
            readings,
            self._knowledge,
            self._context_objects,
            self._settings.coherence,
        )
        self._classes.update(candidate.kind for candidate in found)
        self._counts["dropped_pronoun"] += sum(candidate.pronoun for candidate in found)
        pairs = self._pair(found)
        chosen = self._next(found)
        self._steps.append(step_line(found, pairs, ended=ended, chosen_next=chosen))
        if chosen is not None:
            self._sentences.append(chosen.text)
            self._context_objects |= dict.fromkeys(chosen.names)
        self.complete = chosen is None or len(self._sentences) >= self._settings.max_sentences

    def _ask(self, mentions: Sequence[ObjectMention], witnesses: Witnesses) -> None:
        new = self._knowledge.unknown(mentions)
        if not new:
            return
        answers = witnesses.ask(self.picture, list(dict.fromkeys(new.values())))
        self._counts["detector_failures"] += answers.failures
        self._errors += answers.errors
        self._knowledge.learn(new, answers.findings, witnesses.policy, witnesses.out_of_vocabulary)

    def _pair(self, found: Sequence[Candidate]) -> dict[int, Pair]:
        made = build_pairs(
            found,
            context_is_empty=not self._sentences,
            allow_empty_context=self._settings.allow_empty_context_pairs,
            allow_agnostic=self._settings.allow_agnostic_pairs,
            pairing=self._settings.pairing,
            context_objects=self._context_objects,
        )
        kept = [pair for pair in made if not same_text(pair.chosen.text, pair.rejected.text)]
        self._counts["dropped_equal"] += len(made) - len(kept)
        numbered = dict(enumerate(kept))
        self._pairs += [
            pair_line(
                self.picture.id,
                number,
                pair,
                image=self._image,
                question=self._question,
                context=self._context,
                context_objects=list(self._context_objects),
                step=len(self._steps),
                meta=self._meta,
            )
            for number, pair in numbered.items()
        ]
        return numbered

    def _next(self, found: Sequence[Candidate]) -> Candidate | None:
        settings = self._settings
        positions = may_come_next(
            found, settings.next_sentence, allow_objectless=settings.allow_objectless_context
        )
        position = choose(positions, settings.seed, self.picture.id, len(self._steps), "next")
        return None if position is None else found[position]

    def outcome(self) -> Outcome:
        """Its lines and its status so far; final once it is complete."""
        status = self._status()
        pairs, counts = list(self._pairs), Counter(self._counts)
        if status == "suspicious_image" and not self._settings.keep_suspicious:
            counts["withheld_pairs"] = len(pairs)
            pairs = []
        line = image_line(
            self.picture.id,
            image=self._image,
            question=self._question,
            status=status,
            sentences=self._sentences,
            knowledge=self._knowledge,
            counts=counts,
            steps=self._steps,
            errors=list(dict.fromkeys(self._errors)),
        )
        lines = {"pairs": pairs, "images": [line]}
        return Outcome(self.picture.id, status, lines, self.seconds)

    def _status(self) -> str:
        if self._broken:
            return "model_error"
        if self._knowledge.nothing_found():
            return "suspicious_image"
        if self._pairs:
            return "ok"
        kinds = self._classes.keys() - {"objectless"}
        if not kinds:
            return "no_objects"
        return "skipped_uncertain" if kinds == {"uncertain"} else "no_pairs"
