"""Watches how many sentences name no object: text that is not English shows there first."""

from __future__ import annotations

from collections.abc import Sequence

from data_tools.sentinel.objects import ObjectMention

__all__ = ["ObjectlessShare"]


class ObjectlessShare:
    """Share of sentences without an object, per hundred images.

    Args:
        images: Images per share.
        limit: Largest share that is not remarked on.

    Attributes:
        shares: The shares so far, one per full group of images.
    """

    def __init__(self, images: int = 100, limit: float = 0.6) -> None:
        if images < 1:
            raise ValueError(f"images must be at least 1, got {images}")
        if not 0 < limit < 1:
            raise ValueError(f"limit must be between 0 and 1, got {limit}")
        self.shares: list[float] = []
        self._images = images
        self._limit = limit
        self._seen = self._sentences = self._without = 0

    def add(self, mentions: Sequence[Sequence[ObjectMention]]) -> str | None:
        """Counts the sentences of one more image.

        Args:
            mentions: What was found in each of them.

        Returns:
            A warning if this image completes a group whose share is above the limit.
        """
        self._seen += 1
        self._sentences += len(mentions)
        self._without += sum(not one for one in mentions)
        if self._seen < self._images:
            return None
        share = self._without / self._sentences if self._sentences else 0.0
        self.shares.append(share)
        self._seen = self._sentences = self._without = 0
        if share <= self._limit:
            return None
        return (
            f"{share:.0%} of the sentences of the last {self._images} images name no object "
            f"(expected: below {self._limit:.0%}). Does the model answer in English?"
        )
