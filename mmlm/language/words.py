"""From a caption to words: sentences, tokens, parts of speech and dictionary forms, offline.

CHAIR and AMBER depend on what NLTK makes of a caption. NLTK's code is used as it is; the data it
would download lies compactly in ``mmlm/language/data`` (see the README there), so nothing is
fetched. The whole WordNet corpus is replaced by a table of the forms that matter for CHAIR.

Nothing here is imported before the first caption is scored: NLTK and the tables load on first use.
"""

from __future__ import annotations

import functools
import re
from typing import TYPE_CHECKING, NamedTuple

from mmlm.language.tables import load_table

if TYPE_CHECKING:
    from collections.abc import Sequence

    from nltk.tag.perceptron import PerceptronTagger
    from nltk.tokenize.destructive import NLTKWordTokenizer
    from nltk.tokenize.punkt import PunktSentenceTokenizer

__all__ = [
    "Tokens",
    "lemmatize",
    "part_of_speech",
    "penn_tags",
    "singularize",
    "tokenize",
]


class Tokens(NamedTuple):
    """The tokens of a text and, for each, the index of the sentence it stands in."""

    words: tuple[str, ...]
    sentence: tuple[int, ...]


def tokenize(text: str) -> Tokens:
    """Splits a text like ``nltk.word_tokenize``: Punkt sentences, then Treebank words.

    The sentence split comes first because the word tokeniser separates a full stop only at the
    end of what it is given: without it "dog. A" would keep "dog.".

    Args:
        text: Any text; the CHAIR scorers pass it in lower case.

    Returns:
        The tokens in order with their sentence index (0-based).
    """
    splitter, tokenizer = _sentence_splitter(), _word_tokenizer()
    words: list[str] = []
    sentence: list[int] = []
    for index, span in enumerate(splitter.tokenize(text)):
        tokens = tokenizer.tokenize(span)
        words += tokens
        sentence += [index] * len(tokens)
    return Tokens(tuple(words), tuple(sentence))


def penn_tags(tokens: Sequence[str]) -> list[str]:
    """Penn Treebank tag per token ("NN", "VBZ", ...), as ``nltk.pos_tag`` gives it."""
    return [tag for _, tag in _tagger().tag(list(tokens))]


def part_of_speech(tokens: Sequence[str]) -> list[str]:
    """WordNet's letter (n, v, a, r) per token, from NLTK's English perceptron tagger.

    Everything that is neither verb, adjective nor adverb counts as a noun, as in the LVLM scorers.
    """
    letters = {"J": "a", "V": "v", "R": "r"}
    return [letters.get(tag[0], "n") for tag in penn_tags(tokens)]


def lemmatize(word: str, letter: str) -> str:
    """WordNet's dictionary form of a lower-case word; the word itself if the table lacks it.

    Args:
        word: The token.
        letter: Its part of speech: n, v, a or r.
    """
    return str(_lemmas()[letter].get(word, word))


@functools.lru_cache(maxsize=65536)
def singularize(word: str) -> str:
    """Singular of a lower-case word as ``pattern.en.singularize`` (3.6) gives it.

    The first matching step wins. Several are odd on purpose, because scores depend on them:
    "bus" -> "bu", "glass" -> "glas", "ties" -> "ty", "cookies" stays, "four" -> "fmy".
    """
    table = _singular_table()
    head, hyphen, tail = word.partition("-")
    if hyphen and tail.split("-")[0] in table.prepositions:
        return f"{singularize(head)}-{tail}"
    if word.endswith("'"):
        return singularize(word[:-1]) + "'s"
    # The *entry* must end with the word, not the other way round: "s" and "es" stay.
    if any(entry.endswith(word) for entry in table.unchanged):
        return word
    if word.endswith(table.ie):
        return word
    for plural, singular in table.irregular:
        if word.endswith(plural):
            return word[: -len(plural)] + singular
    for rule, replacement in table.rules:
        if match := rule.search(word):
            for number, group in enumerate(match.groups(), start=1):
                if group is None:
                    replacement = replacement.replace(f"\\{number}", "")
            return rule.sub(replacement, word)
    return word


class _SingularTable(NamedTuple):
    prepositions: frozenset[str]
    unchanged: tuple[str, ...]
    ie: tuple[str, ...]
    irregular: tuple[tuple[str, str], ...]
    rules: tuple[tuple[re.Pattern[str], str], ...]


@functools.cache
def _singular_table() -> _SingularTable:
    raw = load_table("pattern_singularize.json")
    return _SingularTable(
        prepositions=frozenset(raw["plural_prepositions"]),
        unchanged=(*raw["uninflected"], *raw["uncountable"]),
        ie=tuple(f"{entry}s" for entry in raw["ie"]),
        irregular=tuple((plural, singular) for plural, singular in raw["irregular"]),
        rules=tuple((re.compile(rule["search"]), rule["replace"]) for rule in raw["rules"]),
    )


@functools.cache
def _lemmas() -> dict[str, dict[str, str]]:
    return load_table("wordnet_lemmas.json")


@functools.cache
def _sentence_splitter() -> PunktSentenceTokenizer:
    from nltk.tokenize.punkt import PunktParameters, PunktSentenceTokenizer

    raw = load_table("punkt_english.json.xz")
    parameters = PunktParameters()
    parameters.abbrev_types = set(raw["abbrev_types"])
    parameters.collocations = {tuple(pair) for pair in raw["collocations"]}
    parameters.sent_starters = set(raw["sent_starters"])
    parameters.ortho_context.update(raw["ortho_context"])
    return PunktSentenceTokenizer(parameters)


@functools.cache
def _word_tokenizer() -> NLTKWordTokenizer:
    from nltk.tokenize.destructive import NLTKWordTokenizer

    return NLTKWordTokenizer()


@functools.cache
def _tagger() -> PerceptronTagger:
    from nltk.tag.perceptron import PerceptronTagger

    raw = load_table("perceptron_tagger_english.json.xz")
    tagger = PerceptronTagger(load=False)
    tagger.decode_json_params((raw["weights"], raw["tagdict"], raw["classes"]))
    return tagger
