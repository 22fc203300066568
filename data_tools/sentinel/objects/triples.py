"""Scene-graph triples and the objects in them: what the back ends ``sng`` and ``factual`` give."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence

from data_tools.sentinel.objects import ObjectMention, nouns
from data_tools.sentinel.objects.coco import canonical
from data_tools.sentinel.objects.reading import Token, lowered
from mmlm.language.words import penn_tags

__all__ = ["NounsOf", "Triple", "locate", "objects_of_triples", "parse_triples", "tagged_nouns"]

Triple = Sequence[str]
"""Subject, predicate, object."""

NounsOf = Callable[[str], Sequence[str]]
"""The nouns among the words of a phrase, in lower case."""

_BRACKETS = re.compile(r"\(([^()]*)\)")
_COPULAS = ("is", "are")


def tagged_nouns(phrase: str) -> list[str]:
    """Nouns of a phrase by NLTK's tagger; a word that stands alone is taken for one.

    A subject or an object of a triple is a noun by construction, and no tagger is reliable on a
    word without its sentence.
    """
    words = phrase.lower().split()
    if len(words) == 1:
        return words
    return [word for word, tag in zip(words, penn_tags(words), strict=True) if tag[:2] == "NN"]


def objects_of_triples(triples: Sequence[Triple], nouns_of: NounsOf = tagged_nouns) -> list[str]:
    """Names of the concrete objects in triples, each once, in order (SENTINEL, 2507.12455, code).

    Of "cat is black" only the subject counts, of "cat sits on chair" both ends. One word is given
    in its dictionary form; several are kept as they are if a noun among them is concrete and not
    an object already: "red car" after "car" is nothing new.

    Args:
        triples: The triples; one that has not three parts is ignored.
        nouns_of: Finds the nouns of a phrase.
    """
    found: list[str] = []
    for triple in triples:
        if len(triple) != 3:
            continue
        subject, predicate, other = triple
        for phrase in (subject,) if predicate in _COPULAS else (subject, other):
            name = _object(" ".join(phrase.lower().split()), found, nouns_of)
            if name is not None:
                found.append(name)
    return found


def _object(phrase: str, found: Sequence[str], nouns_of: NounsOf) -> str | None:
    if not phrase or phrase in found:
        return None
    lemmas = [nouns.lemma(noun) for noun in nouns_of(phrase)]
    if not any(lemma not in found and nouns.is_concrete(lemma) for lemma in lemmas):
        return None
    return phrase if " " in phrase else lemmas[0]


def parse_triples(text: str) -> list[list[str]]:
    """Reads what the FACTUAL parser writes: ``( table , on , floor ), ( cat , is , black )``."""
    return [
        [part.strip() for part in inside.split(",")]
        for inside in _BRACKETS.findall(text)
        if inside.strip()
    ]


def locate(names: Sequence[str], sentence: str, tokens: Sequence[Token]) -> list[ObjectMention]:
    """Finds the places where a sentence names objects.

    Args:
        names: Names as `objects_of_triples` gives them.
        sentence: The sentence.
        tokens: Its words.

    Returns:
        A mention per name, where it stands first. A name that does not stand in the sentence is
        left out: a parser that writes text can write what nobody said.
    """
    forms = [{lowered(token.text), nouns.lemma(lowered(token.text))} for token in tokens]
    mentions = []
    for name in names:
        words = name.split()
        for first in range(len(tokens) - len(words) + 1):
            if all(word in forms[first + i] for i, word in enumerate(words)):
                start, end = tokens[first].start, tokens[first + len(words) - 1].end
                lemma = " ".join([*words[:-1], nouns.lemma(words[-1])])
                mentions.append(
                    ObjectMention(sentence[start:end], lemma, canonical(name), start, end)
                )
                break
    return mentions
