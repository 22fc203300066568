"""The numbers of a SENTINEL run, read from its lines: what was sampled, labelled and paired."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.records import read_kind
from data_tools.sentinel.records import CLASSES, FAILED
from mmlm.sharding import Shard

__all__ = ["FAILED_SHARE", "OBJECTLESS_SHARE", "Summary", "summarise"]

FAILED_SHARE = 0.2
"""A run with a larger share of failed pictures counts as failed itself."""
OBJECTLESS_SHARE = 0.6
"""With a larger share of sentences without objects, the extractor may not know the language."""


@dataclass
class Summary:
    """Counts over a whole run.

    Attributes:
        images: Pictures by status.
        pairs: Pairs by kind.
        pairs_by_step: Pairs by the number of sentences before them.
        classes_by_step: Distinct candidates by class, for every number of sentences before them.
        drawn: Samples, repeated and empty ones included.
        labels: Named objects by label, each picture's names counted once.
        invented: Absent objects by name, each picture counted once.
        rejected_by: Rejected names by detector.
        counts: What was dropped, see `data_tools.sentinel.records.COUNTS`.
        sentences: Sentences in the captions.
    """

    images: Counter[str] = field(default_factory=Counter)
    pairs: Counter[str] = field(default_factory=Counter)
    pairs_by_step: Counter[int] = field(default_factory=Counter)
    classes_by_step: dict[int, Counter[str]] = field(default_factory=dict)
    drawn: int = 0
    labels: Counter[str] = field(default_factory=Counter)
    invented: Counter[str] = field(default_factory=Counter)
    rejected_by: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)
    sentences: int = 0

    @property
    def classes(self) -> Counter[str]:
        """Distinct candidates by class."""
        return sum(self.classes_by_step.values(), Counter())

    @property
    def pairs_per_image(self) -> float:
        """Pairs per picture; 0 without pictures."""
        return self.pairs.total() / max(self.images.total(), 1)

    @property
    def failed_share(self) -> float:
        """Share of pictures that failed; 0 without pictures."""
        failed = sum(self.images[status] for status in FAILED)
        return failed / max(self.images.total(), 1)

    @property
    def objectless_share(self) -> float:
        """Share of distinct candidates that name no object; 0 without candidates."""
        return self.classes["objectless"] / max(self.classes.total(), 1)

    def add_image(self, line: Mapping[str, Any]) -> None:
        """Counts a line of ``images.jsonl``."""
        self.images[line["status"]] += 1
        self.sentences += line.get("n_sentences", 0)
        for label in ("factual", "uncertain", "hallucinated"):
            self.labels[label] += len(line.get(label, ()))
        self.invented.update(line.get("hallucinated", ()))
        for detector, names in line.get("rejected_by", {}).items():
            self.rejected_by[detector] += len(names)
        self.counts.update(line.get("counts", {}))
        for number, step in enumerate(line.get("steps", ())):
            here = self.classes_by_step.setdefault(number, Counter())
            here.update(candidate["class"] for candidate in step["candidates"])
            self.drawn += step["ended"] + sum(one["drawn"] for one in step["candidates"])

    def add_pair(self, line: Mapping[str, Any]) -> None:
        """Counts a line of ``pairs.jsonl``."""
        self.pairs[line["kind"]] += 1
        self.pairs_by_step[line["step"]] += 1

    def as_json(self) -> dict[str, Any]:
        """Plain JSON."""
        return {
            "images": dict(self.images),
            "pairs": self.pairs.total(),
            "pairs_per_image": round(self.pairs_per_image, 4),
            "pairs_by_kind": dict(self.pairs),
            "pairs_by_step": {str(step): n for step, n in sorted(self.pairs_by_step.items())},
            "candidates_by_class": {name: self.classes[name] for name in CLASSES},
            "samples": self.drawn,
            "labels": dict(self.labels),
            "invented": dict(self.invented.most_common(20)),
            "rejected_by": dict(self.rejected_by),
            "counts": dict(self.counts),
            "failed_share": round(self.failed_share, 4),
            "objectless_share": round(self.objectless_share, 4),
            "sentences": self.sentences,
        }


def summarise(folder: Path, shard: Shard | None = None) -> Summary:
    """Reads the lines of a finished or running stage; memory does not grow with their number.

    Args:
        folder: Output of ``mmlm data sentinel``.
        shard: One shard of it; by default the whole, shards merged.

    Raises:
        InputError: If there is no such output, or it is damaged.
    """
    summary = Summary()
    for line in _lines(folder, "images", shard or Shard()):
        summary.add_image(line)
    for line in _lines(folder, "pairs", shard or Shard()):
        summary.add_pair(line)
    return summary


def _lines(folder: Path, kind: str, shard: Shard) -> Iterable[dict[str, Any]]:
    return (line for _, lines in read_kind(folder, kind, shard) for line in lines)
