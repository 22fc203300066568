"""Grounding DINO's way of being asked: names as one caption, answers as phrases of it.

Grounding DINO (arXiv 2303.05499) reads all names as one text, ``bench . dog . red car .``, and
gives every box a confidence per token of it. The text encoder has room for 256 tokens; the model's
own code cuts off what is longer. Here the names go into several captions instead.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_tools.detectors import Box, Finding
from data_tools.detectors.matching import labels_to_findings
from data_tools.detectors.neural import PictureFeatures, boxes_in, not_too_thin
from data_tools.pictures import Picture

if TYPE_CHECKING:
    import torch

__all__ = ["ENCODER_TOKENS", "GroundingEngine", "Rules", "captions"]

ENCODER_TOKENS = 254
"""Room in Grounding DINO's text encoder: 256 tokens less the first and the last."""


@dataclass(frozen=True)
class Rules:
    """How names are asked and phrases are read; see the detectors' fields."""

    box_threshold: float
    text_threshold: float
    substring_match: bool
    max_text_tokens: int
    names_at_once: int | None
    captions_at_once: int


class GroundingEngine:
    """A loaded Grounding DINO, of whichever package.

    Args:
        forward: From the encoder's arguments (of one row per caption) and captions to logits per
            query and token [B, Q, T] and boxes [B, Q, 4] as centre and size, in shares.
        tokenizer: The text encoder's.
        features: Its image encoder.
        weights: Hash of its weights.
        rules: How names are asked and phrases are read.
    """

    def __init__(
        self,
        forward: Callable[[tuple[Any, ...], list[str]], tuple[torch.Tensor, torch.Tensor]],
        tokenizer: Any,
        features: PictureFeatures,
        weights: str,
        rules: Rules,
    ) -> None:
        self.features = features
        self.weights = weights
        self._forward = forward
        self._tokenizer = tokenizer
        self._rules = rules

    def find(self, picture: Picture, names: Sequence[str]) -> dict[str, Finding | None]:
        """Looks for names; None for one that the text encoder cannot read."""
        rules = self._rules
        found: dict[str, Finding | None] = dict.fromkeys(names)
        groups = list(captions(names, self._tokenizer, rules.max_text_tokens, rules.names_at_once))
        for start in range(0, len(groups), rules.captions_at_once):
            chunk = groups[start : start + rules.captions_at_once]
            for group, boxes in zip(chunk, self._boxes(picture, chunk), strict=True):
                found |= labels_to_findings(group, boxes, substring=rules.substring_match)
        return found

    def _boxes(self, picture: Picture, groups: Sequence[Sequence[str]]) -> Iterator[list[Box]]:
        """The boxes that each caption finds."""
        texts = [caption(group) for group in groups]
        logits, places = self._forward(self.features.show(picture), texts)
        seen = not_too_thin(picture.image).size
        for text, own, where in zip(texts, logits.float().sigmoid().cpu(), places, strict=True):
            best = own.amax(dim=1)
            kept = (best > self._rules.box_threshold).nonzero().flatten().tolist()
            ids = self._tokenizer(text)["input_ids"]
            above = own[:, : len(ids)] > self._rules.text_threshold
            found = [
                (where[query].tolist(), float(best[query]), self._phrase(above[query], ids))
                for query in kept
            ]
            yield boxes_in(picture.image, seen, found)

    def _phrase(self, above: torch.Tensor, ids: Sequence[int]) -> str:
        """The tokens above the threshold as text, without marks; may be of several names."""
        tokens = [ids[position] for position in above.nonzero().flatten().tolist()]
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return " ".join(text.replace(".", " ").split())


def caption(names: Sequence[str]) -> str:
    """The text that asks for names: ``bench . dog . red car .``."""
    return "".join(f"{_cleaned(name)} . " for name in names).strip()


def captions(
    names: Sequence[str], tokenizer: Any, max_tokens: int, max_names: int | None = None
) -> Iterator[list[str]]:
    """Distributes names over captions, in order, as many as fit into each.

    Args:
        names: Names; those the tokenizer has no token for, or that are too long for any caption,
            are left out.
        tokenizer: The text encoder's.
        max_tokens: Room of a caption in tokens, the mark behind every name included.
        max_names: Most names of a caption.

    Yields:
        The names of a caption, at least one.
    """
    group: list[str] = []
    room = max_tokens
    for name in names:
        ids = tokenizer(_cleaned(name), add_special_tokens=False)["input_ids"]
        needed = len(ids) + 1
        if not ids or tokenizer.unk_token_id in ids or needed > max_tokens:
            continue
        if needed > room or len(group) == max_names:
            yield group
            group, room = [], max_tokens
        group.append(name)
        room -= needed
    if group:
        yield group


def _cleaned(name: str) -> str:
    """Without the marks that would end the name: the model takes them for separators."""
    return " ".join(re.sub(r"[.?]", " ", name.lower()).split())
