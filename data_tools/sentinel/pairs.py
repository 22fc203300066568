"""From candidates for the next sentence to pairs, and to the sentence that extends the context.

Pure functions: equal arguments give equal results, in every process.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

from data_tools.generators import Sample
from data_tools.sentinel.labels import Knowledge, Label
from data_tools.sentinel.objects import ObjectMention
from data_tools.sentinel.reading import Reading
from data_tools.sentinel.settings import Coherence, FinishRule, NextRule, Pairing

__all__ = [
    "CLASSES",
    "Candidate",
    "Class",
    "Pair",
    "Sentence",
    "build_pairs",
    "candidates",
    "choose",
    "classify",
    "is_finished",
    "may_come_next",
    "n_empty",
    "same_text",
    "stable_hash",
    "unique_sentences",
]

Class: TypeAlias = Literal["coherent", "agnostic", "hallucinated", "uncertain", "objectless"]
CLASSES: tuple[Class, ...] = ("coherent", "agnostic", "hallucinated", "uncertain", "objectless")
"""Clean sentences are coherent (they speak of something in the context) or agnostic (they do not).
Unused ones are uncertain (nothing hallucinated, but the detectors differ) or objectless.
"""
PairKind: TypeAlias = Literal["coherent", "agnostic", "empty_context"]

_CLEAN = ("coherent", "agnostic")
_HOW_MANY = re.compile(r"\b(?:an?|the|some|several|many|one|two|three|four|five)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Candidate:
    """A sentence that may come next.

    Attributes:
        text: The sentence.
        mentions: Objects it names, in order.
        kind: Its class.
        hallucinated: Canonical names of its absent objects, in order, each once.
        drawn: How many samples had this text.
        finished: Whether the model ended the caption with it.
        pronoun: Whether its only subject is a pronoun, so that it may be about anything.
    """

    text: str
    mentions: tuple[ObjectMention, ...]
    kind: Class
    hallucinated: tuple[str, ...] = ()
    drawn: int = 1
    finished: bool = False
    pronoun: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """Canonical names of its objects, in order, each once."""
        return tuple(dict.fromkeys(mention.canonical for mention in self.mentions))


@dataclass(frozen=True)
class Pair:
    """Two sentences after the same context.

    Attributes:
        chosen: A clean one.
        rejected: One with an absent object.
        kind: What the chosen one has to do with the context.
    """

    chosen: Candidate
    rejected: Candidate
    kind: PairKind


class Sentence(NamedTuple):
    """A text that was sampled.

    Attributes:
        text: The text.
        drawn: How many samples have it.
        finished: Whether the caption ended with any of them.
    """

    text: str
    drawn: int = 1
    finished: bool = False


def unique_sentences(samples: Sequence[Sample]) -> list[Sentence]:
    """The different sentences among samples, in order of first occurrence, empty ones left out."""
    found: dict[str, Sentence] = {}
    for sample in samples:
        if sample.text:
            _, drawn, finished = found.get(sample.text, Sentence(sample.text, 0))
            found[sample.text] = Sentence(sample.text, drawn + 1, finished or sample.finished)
    return list(found.values())


def n_empty(samples: Sequence[Sample]) -> int:
    """How many samples are no sentence, because the model ended the caption instead."""
    return sum(not sample.text for sample in samples)


def is_finished(samples: Sequence[Sample], rule: FinishRule) -> bool:
    """Whether a caption is complete.

    Args:
        samples: All samples of a step.
        rule: ``ended``: more than half of them are empty, because the model ended the caption.
            ``authors``: more than half of them are empty or repeat another one, so that ten equal
            sentences end it too.
    """
    useless = n_empty(samples)
    if rule == "authors":
        useless = len(samples) - len(unique_sentences(samples))
    return 2 * useless > len(samples)


def classify(
    mentions: Sequence[ObjectMention],
    labels: dict[str, Label],
    context_objects: Collection[str],
    coherence: Coherence,
) -> Class:
    """The class of a sentence.

    Args:
        mentions: Objects it names.
        labels: Labels of all of them, by canonical name.
        context_objects: Canonical names in the context.
        coherence: ``any``: one object of the sentence must be in the context for it to be coherent
            (paper). ``all``: every one (first release of the authors' code).
    """
    if not mentions:
        return "objectless"
    own = {labels[mention.canonical] for mention in mentions}
    if "hallucinated" in own:
        return "hallucinated"
    if "uncertain" in own:
        return "uncertain"
    known = [mention.canonical in context_objects for mention in mentions]
    return "coherent" if (any if coherence == "any" else all)(known) else "agnostic"


def candidates(
    sentences: Sequence[Sentence],
    readings: Sequence[Reading],
    knowledge: Knowledge,
    context_objects: Collection[str],
    coherence: Coherence,
) -> list[Candidate]:
    """Classifies the sentences of a step.

    Args:
        sentences: The sentences.
        readings: What each says; the picture's knowledge covers all objects.
        knowledge: Of the picture.
        context_objects: Canonical names in the context.
        coherence: See `classify`.
    """
    found = []
    for (text, drawn, finished), (own, pronoun) in zip(sentences, readings, strict=True):
        kind = classify(own, knowledge.labels, context_objects, coherence)
        absent = (m.canonical for m in own if knowledge.labels[m.canonical] == "hallucinated")
        hallucinated = tuple(dict.fromkeys(absent))
        found.append(Candidate(text, own, kind, hallucinated, drawn, finished, pronoun))
    return found


def same_text(first: str, second: str) -> bool:
    """Whether two sentences differ in blanks and capitals only."""
    return first.casefold().split() == second.casefold().split()


def build_pairs(
    found: Sequence[Candidate],
    *,
    context_is_empty: bool,
    allow_empty_context: bool = False,
    allow_agnostic: bool = False,
    pairing: Pairing = "order",
    context_objects: Collection[str] = (),
) -> list[Pair]:
    """Pairs clean sentences with hallucinated ones, each with one at most.

    After a context, coherent sentences win. Before the first sentence nothing can be coherent, so
    there is no pair unless ``allow_empty_context``; any clean sentence wins then.

    Args:
        found: The candidates, in order of first occurrence.
        context_is_empty: Whether this is the first sentence.
        allow_empty_context: See above; the authors' code has no such pairs.
        allow_agnostic: Let agnostic sentences win too (paper, Table on y_w: slightly worse).
        pairing: ``order``: the first with the first, and so on. ``matched``: each hallucinated one
            with a clean one that names as many new objects, if there is one; those that differ in
            nothing but what they name, and how many of it, are paired first. ``same_form``: those
            alone.
        context_objects: Canonical names in the context, for ``matched`` and ``same_form``.
    """
    usable = [candidate for candidate in found if not candidate.pronoun]
    if context_is_empty:
        wanted: tuple[str, ...] = _CLEAN if allow_empty_context else ()
    else:
        wanted = _CLEAN if allow_agnostic else ("coherent",)
    winners = [candidate for candidate in usable if candidate.kind in wanted]
    losers = [candidate for candidate in usable if candidate.kind == "hallucinated"]
    if pairing == "order":
        matched = list(zip(winners, losers, strict=False))
    else:
        matched = _matched(winners, losers, context_objects, any_form=pairing == "matched")
    return [
        Pair(winner, loser, "empty_context" if context_is_empty else _pair_kind(winner))
        for winner, loser in matched
    ]


def _matched(
    winners: Sequence[Candidate],
    losers: Sequence[Candidate],
    context_objects: Collection[str],
    *,
    any_form: bool,
) -> list[tuple[Candidate, Candidate]]:
    known, found = set(context_objects), []
    keys: list[Callable[[Candidate], Any]] = [lambda one: (_form(one), _new(one, known))]
    if any_form:
        keys.append(lambda one: _new(one, known))
    for key in keys:
        free: dict[Any, list[Candidate]] = {}
        for winner in winners:
            free.setdefault(key(winner), []).append(winner)
        waiting = ((free.get(key(loser)), loser) for loser in losers)
        found += [(alike.pop(0), loser) for alike, loser in waiting if alike]
        used = {id(one) for pair in found for one in pair}
        winners, losers = ([o for o in side if id(o) not in used] for side in (winners, losers))
    return found


def _new(candidate: Candidate, known: set[str]) -> int:
    """How many objects it names that the context does not."""
    return len(set(candidate.names) - known)


def _form(candidate: Candidate) -> str:
    """The sentence without what it names, and how many of it."""
    text = candidate.text
    for mention in sorted(candidate.mentions, key=lambda m: m.start, reverse=True):
        text = f"{text[: mention.start]}_{text[mention.end :]}"
    return " ".join(_HOW_MANY.sub("#", text).casefold().split())


def _pair_kind(winner: Candidate) -> PairKind:
    return "coherent" if winner.kind == "coherent" else "agnostic"


def may_come_next(
    found: Sequence[Candidate], rule: NextRule, *, allow_objectless: bool = True
) -> list[int]:
    """Positions of the candidates of which one extends the context.

    New objects come first (agnostic sentences explore the picture), then coherent sentences. If
    there is neither, ``clean`` takes one that is of no use for pairs but without an absent object
    or, if there is none, ends the picture: an absent object in the context brings forth more of
    them (paper, Table 4). ``authors`` takes any candidate then.

    Args:
        found: The candidates.
        rule: See above.
        allow_objectless: Whether a sentence without objects may be taken under ``clean``.
    """
    for kind in ("agnostic", "coherent"):
        if positions := [i for i, one in enumerate(found) if one.kind == kind and not one.pronoun]:
            return positions
    if rule == "authors":
        return list(range(len(found)))
    refused = ("hallucinated",) if allow_objectless else ("hallucinated", "objectless")
    return [i for i, one in enumerate(found) if one.kind not in refused]


def choose(positions: Sequence[int], *key: str | int) -> int | None:
    """One of several positions, drawn by a hash of the key; None if there are none."""
    return positions[stable_hash(*key) % len(positions)] if positions else None


def stable_hash(*key: str | int) -> int:
    """A number in [0, 2 ** 63) that depends on the key only: a seed of its own for every purpose.

    Python's own ``hash`` of text differs from process to process.
    """
    text = "\x1f".join(map(str, key)).encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big") >> 1
