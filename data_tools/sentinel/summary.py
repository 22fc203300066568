"""What a run came to, counted from its audit lines."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from data_tools.sentinel.records import FAILED

__all__ = ["FAILED_SHARE", "OBJECTLESS_SHARE", "Summary", "summarize"]

FAILED_SHARE = 0.2
"""A run with a larger share of failed pictures counts as failed itself."""
OBJECTLESS_SHARE = 0.6
"""With a larger share of sentences without objects, the extractor may not know the language."""


@dataclass
class Summary:
    """Counts of a run.

    Attributes:
        statuses: Pictures by status.
        pairs_by_step: Pairs by the step they were made in, from 0.
        sentences: Different sentences of all steps by class.
        objects: Objects by label.
        counts: See `data_tools.sentinel.records.COUNTS`.
    """

    statuses: Counter[str] = field(default_factory=Counter)
    pairs_by_step: Counter[int] = field(default_factory=Counter)
    sentences: Counter[str] = field(default_factory=Counter)
    objects: Counter[str] = field(default_factory=Counter)
    counts: Counter[str] = field(default_factory=Counter)

    @property
    def images(self) -> int:
        """Number of pictures."""
        return self.statuses.total()

    @property
    def pairs(self) -> int:
        """Number of pairs."""
        return self.pairs_by_step.total()

    @property
    def pairs_per_image(self) -> float:
        """Pairs per picture; 0 without pictures."""
        return self.pairs / self.images if self.images else 0.0

    @property
    def failed_share(self) -> float:
        """Share of pictures that failed; 0 without pictures."""
        failed = sum(self.statuses[status] for status in FAILED)
        return failed / self.images if self.images else 0.0

    @property
    def objectless_share(self) -> float:
        """Share of sentences that name no object; 0 without sentences."""
        total = self.sentences.total()
        return self.sentences["objectless"] / total if total else 0.0

    def as_json(self) -> dict[str, Any]:
        """All of it as JSON values."""
        return {
            "images": self.images,
            "statuses": dict(sorted(self.statuses.items())),
            "pairs": self.pairs,
            "pairs_per_image": round(self.pairs_per_image, 4),
            "pairs_by_step": {str(k): n for k, n in sorted(self.pairs_by_step.items())},
            "sentences": dict(sorted(self.sentences.items())),
            "objectless_share": round(self.objectless_share, 4),
            "objects": dict(sorted(self.objects.items())),
            "counts": dict(sorted(self.counts.items())),
            "failed_share": round(self.failed_share, 4),
        }


def summarize(images: Iterable[Mapping[str, Any]]) -> Summary:
    """Counts audit lines, one after the other: memory does not grow with their number.

    Args:
        images: Lines of ``images.jsonl``.
    """
    summary = Summary()
    for line in images:
        summary.statuses[line["status"]] += 1
        summary.counts.update(line.get("counts", {}))
        for label in ("factual", "uncertain", "hallucinated"):
            summary.objects[label] += len(line.get(label, ()))
        withheld = line.get("counts", {}).get("withheld_pairs", 0)
        for number, step in enumerate(line.get("steps", ())):
            for candidate in step["candidates"]:
                summary.sentences[candidate["class"]] += 1
                if not withheld:
                    summary.pairs_by_step[number] += len(candidate.get("chosen", ()))
    return summary
