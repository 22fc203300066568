"""What kind of thing a noun names, and its dictionary form, from a compact table of WordNet 3.0.

The table holds WordNet's 117,798 nouns with the lexicographer class of their first sense, and the
irregular plurals; `tools/build_noun_table.py` makes it. Class and dictionary form are those that
NLTK's WordNet reader finds, which SENTINEL's code uses.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

from mmlm.language.tables import load_table

__all__ = [
    "ABSTRACT",
    "CLASSES",
    "base_forms",
    "is_concrete",
    "is_noun",
    "lemma",
    "noun_class",
    "singular",
]

CLASSES = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication",
    "event", "feeling", "food", "group", "location", "motive", "object", "person", "phenomenon",
    "plant", "possession", "process", "quantity", "relation", "shape", "state", "substance",
    "time",
)  # fmt: skip
"""WordNet's 26 lexicographer classes of nouns, in its order; ``Tops`` is the top of the tree."""

ABSTRACT = frozenset(
    "feeling attribute state shape time quantity cognition event communication relation act "
    "location".split()
)
"""Classes whose members cannot be seen as an object, by SENTINEL (arXiv 2507.12455, its code)."""

_ENDINGS = (
    ("s", ""), ("ses", "s"), ("ves", "f"), ("xes", "x"), ("zes", "z"), ("ches", "ch"),
    ("shes", "sh"), ("men", "man"), ("ies", "y"),
)  # fmt: skip
"""WordNet's rules for regular plurals (morphy): ending -> ending of the singular."""


class _Table(NamedTuple):
    classes: dict[str, str]
    irregular: dict[str, list[str]]


@functools.cache
def _table() -> _Table:
    raw = load_table("nouns.json.xz", "data_tools.sentinel.objects")
    letters = {chr(ord("a") + number): name for number, name in enumerate(CLASSES)}
    nouns = raw["nouns"].split("\n")
    irregular: dict[str, list[str]] = {}
    for line in raw["irregular"].split("\n"):
        plural, *singulars = (form.replace("_", " ") for form in line.split())
        irregular.setdefault(plural, []).extend(singulars)
    names = (letters[letter] for letter in raw["classes"])
    return _Table(dict(zip(nouns, names, strict=True)), irregular)


@functools.lru_cache(maxsize=65536)
def base_forms(noun: str) -> tuple[str, ...]:
    """Every entry of WordNet that a form may belong to, the form itself first.

    Args:
        noun: A word or a name of several words, lower case.
    """
    table = _table()
    forms = table.irregular.get(noun) or [
        noun[: -len(plural)] + singular for plural, singular in _ENDINGS if noun.endswith(plural)
    ]
    return tuple(form for form in dict.fromkeys([noun, *forms]) if form in table.classes)


def lemma(noun: str) -> str:
    """NLTK's dictionary form of a lower-case noun: the shortest entry; without one the noun itself.

    The shortest is not always the right one: "vases" becomes "vas", and "men" stays, because
    WordNet has it as a word for a workforce. See `singular`.
    """
    return min(base_forms(noun), key=len, default=noun)


def singular(noun: str) -> str:
    """Singular of a lower-case plural: WordNet's first entry for it, or the noun itself."""
    return next((form for form in base_forms(noun) if form != noun), noun)


def noun_class(noun: str) -> str | None:
    """WordNet's class of a noun's first sense; None if it is no noun.

    Args:
        noun: A word or a name of several words, lower case, singular or plural.
    """
    forms = base_forms(noun)
    return _table().classes[forms[0]] if forms else None


def is_noun(name: str) -> bool:
    """Whether WordNet has exactly this name among its nouns."""
    return name in _table().classes


def is_concrete(phrase: str) -> bool:
    """Whether any word of a phrase is a noun whose first sense can be seen as an object.

    Only the first sense counts. That is crude: "park" (a location) and "scene" are rejected,
    "table" (first of all an arrangement of data, a group) and "light" (a phenomenon) are accepted.

    Args:
        phrase: One or several words in any case.
    """
    found = (noun_class(word) for word in phrase.lower().split())
    return any(name is not None and name not in ABSTRACT for name in found)
