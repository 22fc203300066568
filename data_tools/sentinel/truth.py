"""How right the pairs are, where the truth is known: pictures of the embedded world.

The pairs are judged without the detectors and without the extractor that made them: a sentence is
read as the two CHAIR scorers read it (`mmlm.language.objects`; each misses some plurals that the
other knows), and its objects are compared with the objects that were drawn.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_tools.records import read_kind
from data_tools.world.export import RUN_RECORD
from mmlm.errors import InputError
from mmlm.language.objects import VARIANTS, node_words

__all__ = ["Judgement", "is_world", "judge_pairs"]


@dataclass(frozen=True)
class Judgement:
    """Pairs against the truth.

    Attributes:
        pairs: Number of pairs.
        rejected_right: Rejected sentences that really name an absent object.
        chosen_right: Chosen sentences that name no absent object.
        named_right: Of the objects that pairs call hallucinated, those that are really absent.
        named: Objects that pairs call hallucinated.
        wrong: Up to twenty ids of pairs that are wrong on either side.
    """

    pairs: int
    rejected_right: int
    chosen_right: int
    named_right: int
    named: int
    wrong: tuple[str, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Counts and shares; a share of nothing is null."""
        return {
            "pairs": self.pairs,
            "rejected_right": self.rejected_right,
            "rejected_precision": _share(self.rejected_right, self.pairs),
            "chosen_right": self.chosen_right,
            "chosen_precision": _share(self.chosen_right, self.pairs),
            "named_right": self.named_right,
            "named": self.named,
            "named_precision": _share(self.named_right, self.named),
            "wrong": list(self.wrong),
        }


def is_world(folder: Path, image: str) -> bool:
    """Whether a picture, its path relative to a folder, belongs to an exported world."""
    return (_world_of(folder / image) / RUN_RECORD).is_file()


def judge_pairs(folder: Path) -> Judgement | None:
    """Compares the pairs of a run with what was drawn.

    Args:
        folder: Output of ``mmlm data sentinel``, shards merged.

    Returns:
        The judgement; None if there is no pair, or the pictures are not of an exported world.

    Raises:
        InputError: If there is no such output, or a picture lies in a world that lacks it.
    """
    counts: Counter[str] = Counter()
    wrong: list[str] = []
    for _, lines in read_kind(folder, "pairs"):
        for line in lines:
            if not is_world(folder, line["images"][0]):
                return None
            there = _objects(folder / line["images"][0])
            rejected = bool(_named(line["rejected"]) - there)
            chosen = not _named(line["chosen"]) - there
            counts["pairs"] += 1
            counts["rejected"] += rejected
            counts["chosen"] += chosen
            counts["named"] += len(line["rejected_hallucinated"])
            counts["named_right"] += len(set(line["rejected_hallucinated"]) - there)
            if not (rejected and chosen) and len(wrong) < 20:
                wrong.append(line["id"])
    if not counts["pairs"]:
        return None
    return Judgement(
        pairs=counts["pairs"],
        rejected_right=counts["rejected"],
        chosen_right=counts["chosen"],
        named_right=counts["named_right"],
        named=counts["named"],
        wrong=tuple(wrong),
    )


def _world_of(image: Path) -> Path:
    return image.parent.parent


def _named(sentence: str) -> set[str]:
    return {name for variant in VARIANTS for name in node_words(sentence, variant)}


def _objects(image: Path) -> frozenset[str]:
    truth = _truth(_world_of(image))
    if image.name not in truth:
        raise InputError(
            f"The picture {str(image)!r} lies in an exported world and is not in its truth.",
            advice="Export the world again with `mmlm data world`, or move the picture elsewhere.",
        )
    return truth[image.name]


@functools.lru_cache(maxsize=4)
def _truth(world: Path) -> Mapping[str, frozenset[str]]:
    """The names of the objects that were drawn into each picture."""
    data = json.loads((world / "instances.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in data["categories"]}
    files = {image["id"]: image["file_name"] for image in data["images"]}
    found: dict[str, set[str]] = {name: set() for name in files.values()}
    for annotation in data["annotations"]:
        found[files[annotation["image_id"]]].add(names[annotation["category_id"]])
    return {name: frozenset(objects) for name, objects in found.items()}


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
