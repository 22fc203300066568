"""Sentences about "it": what to do when a sentence does not say which object it is about.

SENTINEL resolves such sentences with a coreference model, and then trains on the rewritten text.
Here a resolved text serves for finding objects only; what is trained on stays the model's own. With
no such model the pipeline drops candidates whose only subject is a pronoun, and counts them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from data_tools.sentinel.objects.reading import Token, lowered, read_sentence
from mmlm.errors import InputError

__all__ = ["Coreference", "FastCoref", "load_fastcoref", "only_pronoun_subject"]

_PRONOUNS = frozenset("it he she they them him her this that these those both others".split())
"""Words that point at something named before. "I", "you" and "we" are not in the picture."""
_POSSESSIVES = frozenset("its his hers their theirs itself himself herself themselves".split())
_FINITE = ("VBZ", "VBP", "VBD", "MD")
_CLAUSE = frozenset(
    ", ; : while as because that if when although though since whereas where".split()
)
_NOMINAL = ("NN", "PRP", "EX", "CD", "DT")


def only_pronoun_subject(sentence: str) -> bool:
    """Whether every subject of a sentence is a pronoun, as in "it stands on the table".

    The subject of a clause is taken to be its first noun or pronoun that follows no preposition,
    if a finite verb comes after it. "There is a cup", "its wheels are red" and "it is black and
    the dog is brown" have a subject of their own.
    """
    subjects = _subjects(read_sentence(sentence).tokens)
    return bool(subjects) and all(lowered(token.text) in _PRONOUNS for token in subjects)


def _subjects(tokens: Sequence[Token]) -> list[Token]:
    found: list[Token] = []
    subject: Token | None = None
    before_verb = True  # until the finite verb of the clause: behind it stand its objects
    prepositional = False
    for index, token in enumerate(tokens):
        if token.tag in _FINITE:
            found += [subject] if subject is not None else []
            subject, before_verb = None, False
        elif lowered(token.text) in _CLAUSE or token.tag == "CC":
            # "the cat and it are ...": the noun before "and" still waits for the verb.
            if token.tag != "CC" or not before_verb:
                subject = None
            before_verb, prepositional = True, False
        elif token.tag in ("IN", "TO"):
            prepositional = True
        elif before_verb and _is_nominal(tokens, index):
            if prepositional:
                # "in the living room it ...": all nouns of the row belong to the preposition.
                following = tokens[index + 1 : index + 2]
                prepositional = bool(following) and following[0].is_noun
            elif subject is None or lowered(subject.text) in _PRONOUNS:
                subject = token
    if not found and subject is not None:
        found.append(subject)
    return found


def _is_nominal(tokens: Sequence[Token], index: int) -> bool:
    """A noun, a pronoun, "there" - or "this" and "these" where no noun follows."""
    token = tokens[index]
    if token.tag == "PRP$" or not token.tag.startswith(_NOMINAL):
        return False
    if token.tag != "DT":
        return True
    following = tokens[index + 1 : index + 2]
    return lowered(token.text) in _PRONOUNS and (
        not following or following[0].tag in (*_FINITE, "RB")
    )


def _points(phrase: str) -> bool:
    """Whether a phrase names nothing by itself."""
    return phrase.lower() in _PRONOUNS | _POSSESSIVES


class Coreference(Protocol):
    """A model that says what pronouns stand for."""

    def resolve(self, context: str, sentence: str) -> str:
        """The sentence with its pronouns replaced by what they stand for.

        Args:
            context: The sentence before it; SENTINEL gives one.
            sentence: The sentence; in the result everything else is as it was.
        """


class FastCoref:
    """Resolves with a model of the package fastcoref.

    Args:
        predict: From texts to results with ``get_clusters(as_strings=False)``: groups of (start,
            end) of what means the same; the ``predict`` method of a fastcoref model.
    """

    def __init__(self, predict: Callable[..., Sequence[Any]]) -> None:
        self._predict = predict

    def resolve(self, context: str, sentence: str) -> str:
        """See `Coreference`."""
        text = f"{context} {sentence}" if context else sentence
        border = len(text) - len(sentence)
        replaced: list[tuple[int, int, str]] = []
        for cluster in self._predict(texts=[text])[0].get_clusters(as_strings=False):
            names = [text[a:b] for a, b in cluster if not _points(text[a:b])]
            if names:
                replaced += [
                    (a, b, names[0])
                    for a, b in cluster
                    if a >= border and text[a:b].lower() in _PRONOUNS
                ]
        # From the end, so that the places of the earlier ones stay right.
        for start, end, name in sorted(replaced, reverse=True):
            text = text[:start] + name + text[end:]
        return text[border:]


def load_fastcoref(model: str, device: str = "cpu") -> FastCoref:
    """Loads LingMess through fastcoref, which SENTINEL's code uses.

    Args:
        model: Folder of the weights, e.g. a copy of ``biu-nlp/lingmess-coref``.
        device: Where it runs.

    Raises:
        InputError: If the package is missing.
    """
    try:
        from fastcoref import LingMessCoref
    except ImportError as error:
        raise InputError(
            f"fastcoref cannot be imported: {error}.",
            advice="pip install fastcoref; or leave coreference out: sentences about pronouns are "
            "then dropped.",
        ) from error
    return FastCoref(LingMessCoref(model_name_or_path=model, device=device).predict)
