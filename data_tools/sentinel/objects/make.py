"""Extractors by name, with a cache before them."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from data_tools.sentinel.objects import ObjectExtractor, ObjectMention
from data_tools.sentinel.objects.mentions import MentionRules
from data_tools.sentinel.objects.parsers import (
    PIPELINE,
    SpacyExtractor,
    factual_extractor,
    load_pipeline,
    scene_graph_extractor,
)
from data_tools.sentinel.objects.rules import RulesExtractor

__all__ = ["EXTRACTORS", "CachedExtractor", "ExtractorName", "make_extractor"]

ExtractorName = Literal["rules", "spacy", "sng", "factual"]
EXTRACTORS: tuple[ExtractorName, ...] = ("rules", "spacy", "sng", "factual")
CACHE = 100_000
"""Sentences remembered by default: some 100 MB at most."""


def make_extractor(
    name: ExtractorName = "rules",
    *,
    rules: MentionRules | None = None,
    pipeline: str = PIPELINE,
    weights: Path | None = None,
    device: str = "cpu",
    cache: int = CACHE,
) -> ObjectExtractor:
    """Makes an extractor ready to use.

    Args:
        name: ``rules`` needs nothing; ``spacy`` and ``sng`` need the extra ``nlp``; ``factual``
            needs the weights of its parser.
        rules: What counts as an object; None takes the defaults.
        pipeline: Name of spaCy's pipeline, for ``spacy`` and ``sng``.
        weights: Folder of the parser, for ``factual``.
        device: Where the parser of ``factual`` runs.
        cache: Sentences to remember; 0 for none.

    Raises:
        ValueError: For an unknown name, ``factual`` without weights, or a negative cache.
        InputError: If a package, pipeline or weights are missing; says what to install.
    """
    if name not in EXTRACTORS:
        raise ValueError(f"extractor must be one of {', '.join(EXTRACTORS)}, got {name!r}")
    if cache < 0:
        raise ValueError(f"cache must be at least 0, got {cache}")
    rules = rules or MentionRules()
    extractor: ObjectExtractor
    if name == "rules":
        extractor = RulesExtractor(rules)
    elif name == "spacy":
        extractor = SpacyExtractor(load_pipeline(pipeline), rules)
    elif name == "sng":
        extractor = scene_graph_extractor(pipeline, rules)
    else:
        if weights is None:
            raise ValueError("extractor factual needs weights: the folder of its parser")
        extractor = factual_extractor(weights, device, rules)
    return CachedExtractor(extractor, cache) if cache else extractor


class CachedExtractor(ObjectExtractor):
    """Remembers the mentions of sentences, the most recently used ones.

    Candidates repeat: ten samples of one caption, and every sentence once more as context.

    Args:
        extractor: Who is asked about new sentences, all of a call at once.
        size: How many sentences are remembered; > 0.
    """

    def __init__(self, extractor: ObjectExtractor, size: int = CACHE) -> None:
        self._extractor = extractor
        self._size = size
        self._known: OrderedDict[bytes, list[ObjectMention]] = OrderedDict()

    @property
    def facts(self) -> Mapping[str, Any]:
        """Those of the extractor: a cache changes nothing."""
        return self._extractor.facts

    def extract(self, sentences: Sequence[str]) -> list[list[ObjectMention]]:
        """Mentions per sentence, in order of appearance."""
        keys = [hashlib.sha256(sentence.encode()).digest() for sentence in sentences]
        new = {key: s for key, s in zip(keys, sentences, strict=True) if key not in self._known}
        answers = dict(zip(new, self._extractor.extract(list(new.values())), strict=True))
        found = [answers[key] if key in answers else self._known[key] for key in keys]
        for key, mentions in zip(keys, found, strict=True):
            self._known[key] = mentions
            self._known.move_to_end(key)
        while len(self._known) > self._size:
            self._known.popitem(last=False)
        return [list(mentions) for mentions in found]
