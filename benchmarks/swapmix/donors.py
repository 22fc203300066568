"""SwapMix on features: questions about pictures with boxes, and who takes whose place."""

from __future__ import annotations

import random
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from benchmarks.swapmix.features import similar
from benchmarks.swapmix.questions import Asked, Variant
from benchmarks.swapmix.regions import nearest, region

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from torch import Tensor

    from benchmarks.swapmix.boxes import Thing
    from mmlm.token_places import Footprints

__all__ = ["AskedBox", "BoxedPicture", "Donors"]

SIMILAR = 0.7
"""Another look of the same class must not be more like the old one (the authors' bound)."""
TRIES = 20
"""Other looks that are tried for one object (theirs, too)."""


@dataclass(frozen=True)
class BoxedPicture:
    """A picture with boxes.

    Attributes:
        name: Identifies it; also names its features.
        path: The file.
        things: Its objects.
        tokens: Image tokens that show each of them.
        seen: What each image token shows.
    """

    name: str
    path: Path
    things: tuple[Thing, ...]
    tokens: tuple[tuple[int, ...], ...]
    seen: Footprints

    @classmethod
    def of(cls, name: str, path: Path, things: Sequence[Thing], seen: Footprints) -> BoxedPicture:
        """A picture with the tokens of its objects worked out."""
        tokens = tuple(region(seen, thing.box) for thing in things)
        return cls(name, path, tuple(things), tokens, seen)


class AskedBox(NamedTuple):
    """A question about a picture with boxes."""

    kind: str
    subject: str
    text: str
    answer: str


class Donors:
    """Draws who takes an object's place: seeded, without looking at answers.

    Args:
        pictures: All pictures.
        features: Features of each by its name, [tokens, D].
        seed: Of the draws.
    """

    def __init__(
        self, pictures: Sequence[BoxedPicture], features: Mapping[str, Tensor], seed: int = 0
    ) -> None:
        self._features = features
        self._seed = seed
        self._by_class: dict[str, list[tuple[BoxedPicture, int]]] = {}
        self._groups: dict[str, str] = {}
        for picture in pictures:
            for number, thing in enumerate(picture.things):
                self._groups[thing.name] = thing.group
                if picture.tokens[number]:
                    self._by_class.setdefault(thing.name, []).append((picture, number))

    def asked(
        self,
        picture: BoxedPicture,
        number: int,
        question: AskedBox,
        kinds: Sequence[str],
        swaps: int,
    ) -> Asked:
        """A question with every swap of what it is not about.

        Args:
            picture: The picture.
            number: Tells the picture's questions apart.
            question: The question.
            kinds: What is exchanged: object, attribute.
            swaps: Swaps of each kind for each object.
        """
        variants: list[Variant] = []
        skipped = 0
        for index, old in self._replaceable(picture, question.subject):
            if not old:
                skipped += len(kinds) * swaps
                continue
            draw = random.Random(f"{self._seed}|{picture.name}|{number}|{index}")
            for kind in kinds:
                choose = self._classes if kind == "object" else self._looks
                for near, donor in choose(draw, picture, index, question.subject, swaps):
                    variants.append(self._variant(kind, near, picture, index, old, donor))
        return Asked(
            id=f"{picture.name}-{question.kind}-{number}",
            kind=question.kind,
            text=question.text,
            answer=question.answer,
            picture=picture.name,
            image=picture.path,
            variants=tuple(variants),
            skipped=skipped,
        )

    @staticmethod
    def _replaceable(picture: BoxedPicture, subject: str) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Each object that is not asked for, with its tokens that do not show one that is."""
        whole = list(zip(picture.things, picture.tokens, strict=True))
        about = {t for thing, tokens in whole if thing.name == subject for t in tokens}
        for index, (thing, tokens) in enumerate(whole):
            if thing.name != subject:
                yield index, tuple(token for token in tokens if token not in about)

    def _classes(
        self, draw: random.Random, picture: BoxedPicture, index: int, subject: str, count: int
    ) -> Iterator[tuple[bool | None, tuple[BoxedPicture, int]]]:
        """Objects of classes that are neither in the picture nor asked for, half of them near."""
        barred = {thing.name for thing in picture.things} | {subject}
        group = picture.things[index].group
        names = [name for name in sorted(self._by_class) if name not in barred]
        near = [name for name in names if self._groups[name] == group]
        far = [name for name in names if self._groups[name] != group]
        for options, most in ((near, (count + 1) // 2), (far, count // 2)):
            for name in draw.sample(options, min(most, len(options))):
                yield options is near, draw.choice(self._by_class[name])

    def _looks(
        self, draw: random.Random, picture: BoxedPicture, index: int, subject: str, count: int
    ) -> Iterator[tuple[bool | None, tuple[BoxedPicture, int]]]:
        """Objects of the same class in other pictures that look different enough."""
        thing = picture.things[index]
        own = self._features[picture.name][list(picture.tokens[index])]
        options = [d for d in self._by_class[thing.name] if d[0].name != picture.name]
        kept = 0
        for other, number in draw.sample(options, min(TRIES, len(options))):
            if kept == count:
                return
            its = self._features[other.name][list(other.tokens[number])]
            if similar(own, its) <= SIMILAR:
                kept += 1
                yield None, (other, number)

    @staticmethod
    def _variant(
        kind: str,
        near: bool | None,
        picture: BoxedPicture,
        index: int,
        old: tuple[int, ...],
        donor: tuple[BoxedPicture, int],
    ) -> Variant:
        thing = picture.things[index]
        other, number = donor
        new = nearest(picture.seen, old, other.seen, other.tokens[number])
        name = other.things[number].name
        facts = {
            "swapped": thing.name,
            "donor": other.name,
            "old_tokens": list(old),
            "new_tokens": list(new),
        }
        note = f"{thing.name} -> {name} of {other.name}"
        return Variant(kind, picture.path, note, near, facts=facts)
