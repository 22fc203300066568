"""Which questions about several pictures are made of which sources, before any picture is read.

Every source becomes one record per format (Liu et al., arXiv 2410.17637, make all three of the
same sources). Whatever is drawn for a record comes from a generator of its own, seeded with the
run's seed and the record's id: records do not depend on each other.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from data_tools.mia import prompts
from data_tools.mia.layouts import MARGIN, MIN_INNER, TILE
from data_tools.mia.records import ALLOWED, GRID, PIP, SEQUENCE, check_number
from data_tools.mia.sources import Source
from mmlm.errors import InputError

__all__ = ["ComposeSettings", "Plan", "TooFewPictures", "own_generator", "plan"]


class TooFewPictures(InputError, ValueError):  # noqa: N818
    """A source set has fewer different pictures than its records need."""


@dataclass(frozen=True)
class ComposeSettings:
    """How several pictures become one question.

    Defaults are the authors' (their shares are those of the COCO part of their 62K records) unless
    marked as ours.

    Attributes:
        seed: Seed of everything that is drawn; >= 0.
        formats: Per format the share of the sources, in [0, 1], that are made into it.
        sequence: Shares of 2, 3, 4 and 5 pictures among the sequences; any positive numbers.
        grid: Shares of 2, 3, 4, 6 and 9 pictures among the grids.
        companions: Other pictures come from the target's own `source` set, or from `all` sets
            (ours).
        style: `paper` names pictures Image1, Image2 ...; `world` uses the words that the embedded
            model knows (ours).
        tile: Side of a grid's tile in pixels; >= 28.
        margin: White pixels between tiles, and height of the label band above them; >= 0.
        picture_format: png, or jpeg of quality 95 with full colour resolution (ours).
        max_answer: Sources whose answer has so many characters or more are left out; >= 1.
        refuse_every: After every so many records, one that asks for a picture that is not there
            (the authors: 50), kept apart and never made a pair; 0 makes none (ours).
        limit: Use so many sources, drawn by the seed; 0 takes all.

    Raises:
        ValueError: A value is out of its range, or a number of pictures is not one of the format's.
    """

    seed: int = 0
    formats: dict[str, float] = field(default_factory=lambda: dict.fromkeys(ALLOWED, 1.0))
    sequence: dict[int, float] = field(
        default_factory=lambda: {2: 20_000, 3: 6_000, 4: 6_000, 5: 4_410}
    )
    grid: dict[int, float] = field(
        default_factory=lambda: {2: 18_000, 3: 5_000, 4: 5_000, 6: 4_000, 9: 4_410}
    )
    companions: Literal["source", "all"] = "source"
    style: prompts.Style = "paper"
    tile: int = TILE
    margin: int = MARGIN
    picture_format: Literal["png", "jpeg"] = "png"
    max_answer: int = 512
    refuse_every: int = 0
    limit: int = 0

    def __post_init__(self) -> None:
        """Checks the values."""
        for name, low in (
            ("seed", 0), ("tile", MIN_INNER), ("margin", 0), ("max_answer", 1),
            ("refuse_every", 0), ("limit", 0),
        ):  # fmt: skip
            if getattr(self, name) < low:
                raise ValueError(f"{name} must be at least {low}, got {getattr(self, name)}")
        if unknown := self.formats.keys() - ALLOWED.keys():
            raise ValueError(f"formats are {', '.join(ALLOWED)}, got {sorted(unknown)[0]!r}")
        if not all(0 <= share <= 1 for share in self.formats.values()):
            raise ValueError(f"shares of formats must be in [0, 1], got {self.formats}")
        if not any(self.formats.values()):
            raise ValueError("formats must have one share above 0")
        if self.refuse_every and self.style == "world":
            raise ValueError("refuse_every needs the paper style: the world cannot say ImageN")
        for name in (SEQUENCE, GRID):
            self._check_shares(name)

    def _check_shares(self, name: str) -> None:
        shares: Mapping[int, float] = getattr(self, name)
        for n_images, share in shares.items():
            check_number(name, n_images)
            if share < 0:
                raise ValueError(f"shares of {name} must not be negative, got {share}")
            if share and self.used(name) and n_images not in prompts.numbers(name, self.style):
                raise ValueError(f"the {self.style} style has no words for a {name} of {n_images}")
        if self.used(name) and not any(shares.values()):
            raise ValueError(f"{name} must have one share above 0")

    def used(self, name: str) -> bool:
        """Whether any source is made into this format."""
        return self.formats.get(name, 0) > 0

    def shares(self, name: str) -> dict[int, float]:
        """Numbers of pictures of a format that occur, ascending, with their shares."""
        known = {SEQUENCE: self.sequence, GRID: self.grid, PIP: {2: 1.0}}
        return {n: share for n, share in sorted(known[name].items()) if share > 0}


@dataclass(frozen=True)
class Plan:
    """What is to be composed, before any picture is read.

    Attributes:
        records: One per record to be made: ``id``, ``format``, ``n_images``, ``refusal`` and the
            fields of its source.
        pools: Per source set the different pictures that companions are drawn from, sorted.
        too_long: Sources whose answer is too long.
    """

    records: list[dict[str, Any]]
    pools: Mapping[str, Sequence[Path]]
    too_long: int


def plan(sources: Sequence[Source], settings: ComposeSettings) -> Plan:
    """Decides which records are made; reads no picture.

    Args:
        sources: Questions about one picture, with different ids.
        settings: How they are composed.

    Raises:
        TooFewPictures: If a source set cannot give a record its companions; a ValueError.
    """
    short = [one for one in sources if len(one.answer) < settings.max_answer]
    used = _limited(short, settings)
    records = [record for one in used for record in _records(one, settings)]
    if settings.refuse_every:
        every = settings.refuse_every
        asked = [one for one in records if one["format"] != PIP][every - 1 :: every]
        records += [one | {"id": f"{one['id']}-refusal", "refusal": True} for one in asked]
    pools = _pools(sources, settings)
    for record in records:
        available, needed = len(pools[record["pool"]]) - 1, record["n_images"] - 1
        if available < needed:
            raise TooFewPictures(
                f"The source set {record['pool']!r} has {available} pictures beside the target; a "
                f"{record['format']} of {record['n_images']} needs {needed} companions.",
                advice="Give more sources, smaller numbers, or --compose.companions all.",
            )
    return Plan(records, pools, len(sources) - len(short))


def _limited(sources: Sequence[Source], settings: ComposeSettings) -> Sequence[Source]:
    if not settings.limit:
        return sources
    draws = {one.id: own_generator(settings.seed, one.id, "limit").random() for one in sources}
    kept = set(sorted(draws, key=draws.__getitem__)[: settings.limit])
    return [one for one in sources if one.id in kept]


def _records(source: Source, settings: ComposeSettings) -> Iterator[dict[str, Any]]:
    for name, share in settings.formats.items():
        generator = own_generator(settings.seed, source.id, name)
        if generator.random() >= share:
            continue
        shares = settings.shares(name)
        (n_images,) = generator.choices(list(shares), weights=list(shares.values()))
        yield {
            "id": f"{source.id}-{name}{n_images}",
            "format": name,
            "n_images": n_images,
            "refusal": False,
            "image": str(source.image),
            "question": source.question,
            "answer": source.answer,
            "source": source.source,
            "pool": source.source if settings.companions == "source" else "all",
        }


def _pools(sources: Sequence[Source], settings: ComposeSettings) -> dict[str, list[Path]]:
    pools: dict[str, set[Path]] = {}
    for one in sources:
        name = one.source if settings.companions == "source" else "all"
        pools.setdefault(name, set()).add(one.image)
    # Sorted: what is drawn does not depend on the order of the file.
    return {name: sorted(paths) for name, paths in pools.items()}


def own_generator(seed: int, *words: str) -> random.Random:
    """Random numbers that belong to one record, whatever else is made."""
    text = "\0".join((str(seed), *words))
    return random.Random(hashlib.sha256(text.encode()).digest())
