"""From what a detector reports to findings about the names that were asked.

A detector reports labelled boxes, and the labels are not the names: a phrase-grounding model cuts
its labels out of the text it was given ("a red car" for "car"), a closed detector has its own
class names ("dining table" for "table").
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence

from data_tools.detectors import Box, Finding
from mmlm.language.objects import node_of_word
from mmlm.language.words import lemmatize

__all__ = ["class_of", "classes_to_findings", "labels_to_findings"]

Words = tuple[str, ...]


def labels_to_findings(
    names: Sequence[str], labels: Iterable[str | Box], *, substring: bool = False
) -> dict[str, Finding]:
    """What the labels of an open-vocabulary detector say about every name.

    A label counts for a name if the name is in it as a whole phrase, word by word in dictionary
    form, and is no part of a longer asked name there: "a red car" counts for "car", "carrot" does
    not, and "hot dog" counts for "dog" only if "hot dog" was not asked.

    Args:
        names: The names that were asked, in lower case.
        labels: The labels, or boxes with their labels, that the detector returned.
        substring: The rule of SENTINEL's authors instead (arXiv 2507.12455): the name's letters
            stand anywhere in the label, so that "carrot" counts for "car".

    Returns:
        A finding for every name, in the order of the names.
    """
    matched: dict[str, list[str | Box]] = {name: [] for name in names}
    named: dict[Words, list[str]] = {}
    for name in matched:
        named.setdefault(_lemmas(name), []).append(name)
    for label in labels:
        text = label.label if isinstance(label, Box) else label
        if substring:
            hit = [name for name in matched if name in text]
        else:
            hit = [name for phrase in _phrases(_lemmas(text), named) for name in named[phrase]]
        for name in dict.fromkeys(hit):
            matched[name].append(label)
    return {name: _finding(own) for name, own in matched.items()}


def classes_to_findings(
    names: Sequence[str], found: Iterable[str | Box], vocabulary: Collection[str]
) -> dict[str, Finding | None]:
    """What a detector with a closed list of classes says about every name.

    Args:
        names: The names that were asked, in lower case.
        found: The classes, or boxes labelled with them, that were found in the picture.
        vocabulary: All classes the detector knows.

    Returns:
        A finding for every name; None for a name that is no word for any class.
    """
    by_class: dict[str, list[str | Box]] = {}
    for one in found:
        by_class.setdefault(one.label if isinstance(one, Box) else one, []).append(one)
    findings: dict[str, Finding | None] = {}
    for name in names:
        known = class_of(name, vocabulary)
        findings[name] = None if known is None else _finding(by_class.get(known, []))
    return findings


def class_of(name: str, vocabulary: Collection[str]) -> str | None:
    """The class that a name is a word for: itself, or its COCO object ("puppy": "dog"), or None."""
    for candidate in (name, node_of_word().get(name)):
        if candidate is not None and candidate in vocabulary:
            return candidate
    return None


def _finding(labels: Sequence[str | Box]) -> Finding:
    boxes = sorted((one for one in labels if isinstance(one, Box)), key=lambda box: -box.score)
    return Finding(bool(labels), boxes[0].score if boxes else None, tuple(boxes))


def _phrases(words: Words, asked: Collection[Words]) -> Iterable[Words]:
    """The asked phrases in a label, from the left, the longest first."""
    longest = max(map(len, asked), default=0)
    position = 0
    while position < len(words):
        lengths = range(min(longest, len(words) - position), 0, -1)
        phrases = (words[position : position + length] for length in lengths)
        if (phrase := next((one for one in phrases if one in asked), None)) is not None:
            yield phrase
        position += len(phrase or (None,))


@functools.lru_cache(maxsize=65536)
def _lemmas(text: str) -> Words:
    """The words as dictionary forms; tokenizers may have put blanks around hyphens."""
    return tuple(lemmatize(word, "n") for word in re.findall(r"[^\W_]+", text.lower()))
