"""What a link to the page carries: all that was chosen, as JSON; checked when it comes back."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mmlm.cli.frame import closest
from mmlm.cli.web import COLUMNS
from mmlm.decoding_settings import GenerateSettings
from mmlm.errors import InputError, MmlmError
from mmlm.web.method_forms import read_methods

__all__ = [
    "COLUMNS",
    "FIRST_QUESTION",
    "LONGEST_QUESTION",
    "Chosen",
    "from_json",
    "generate_settings",
]

FIRST_QUESTION = "describe the image ."
"""Made of words that the embedded model knows."""
LONGEST_QUESTION = 4000
"""Characters."""
_FORMAT = "mmlm web 1"
_LONGEST = 50_000  # characters of JSON; lists of heads are long
_ASKED = ("max_new_tokens", "do_sample", "num_beams", "temperature", "top_p", "seed")
_MOST_BEAMS = 16


def _defaults() -> dict[str, Any]:
    given = GenerateSettings(max_new_tokens=128)
    return {name: getattr(given, name) for name in _ASKED}


@dataclass(frozen=True)
class Chosen:
    """Everything that a visitor can choose on the compare tab, but an uploaded picture.

    Attributes:
        model: Name of the model; empty for the page's first.
        methods: Text forms, one per column.
        question: What is asked.
        scene: Number of the drawn scene; None if the picture was uploaded.
        generate: How answers are generated, by the names of `GenerateSettings`.
    """

    model: str = ""
    methods: tuple[str, ...] = ()
    question: str = FIRST_QUESTION
    scene: int | None = 17
    generate: Mapping[str, Any] = field(default_factory=_defaults)

    def as_json(self, *, indent: int | None = None) -> str:
        """The settings as JSON, with a word on what they are."""
        content = {"format": _FORMAT, **dataclasses.asdict(self)}
        separators = (",", ":") if indent is None else None
        return json.dumps(content, indent=indent, separators=separators, ensure_ascii=False)


def generate_settings(values: Mapping[str, Any], most_tokens: int) -> GenerateSettings:
    """Generation settings as a visitor may have them.

    Args:
        values: By the names of `GenerateSettings`.
        most_tokens: The page's limit.

    Raises:
        InputError: For a value out of range, or over the page's limits.
    """
    whole = {"max_new_tokens", "num_beams", "seed"}
    given = {}
    for name, value in values.items():
        if value is None:
            raise InputError(f"{name} is empty.", advice="Give a number.")
        given[name] = int(value) if name in whole else value
    for name, most in {"max_new_tokens": most_tokens, "num_beams": _MOST_BEAMS}.items():
        if given[name] > most:
            raise InputError(
                f"{name} is {given[name]}; this page allows {most}.", advice="Ask for less."
            )
    if not given["do_sample"]:
        # They have no meaning then, and the page greys them out.
        given["temperature"], given["top_p"] = 1.0, 1.0
    try:
        return GenerateSettings(**given)
    except ValueError as error:
        raise InputError(f"{error}.", advice="Change it under 'How to answer'.") from error


def from_json(text: str, models: Sequence[str], most_tokens: int) -> Chosen:
    """Reads settings that came back, and refuses everything that does not fit this page.

    Args:
        text: JSON as `Chosen.as_json` writes it.
        models: The models that this page offers.
        most_tokens: The page's limit of new tokens.

    Raises:
        InputError: Says which entry, what it holds and what is allowed.
    """
    if len(text) > _LONGEST:
        raise InputError(
            f"The settings have {len(text)} characters; the longest allowed have {_LONGEST}.",
            advice="Give a file that this page wrote.",
        )
    content = _object(text)
    known = [one.name for one in dataclasses.fields(Chosen)]
    if content.pop("format", None) != _FORMAT:
        raise InputError(
            f"This is no file of settings: its 'format' is not {_FORMAT!r}.",
            advice="Give a file that this page wrote ('Save settings').",
        )
    _refuse_unknown(content, known, "")
    model = _typed(content, "model", (str,), "")
    if model and model not in models:
        raise InputError(
            f"The settings are for the model {model!r}, which is not offered here.",
            advice=f"Offered: {', '.join(models)}. Start the page with --also {model}",
        )
    question = _typed(content, "question", (str,), FIRST_QUESTION)
    if not question.strip() or len(question) > LONGEST_QUESTION:
        raise InputError(
            f"'question' has {len(question)} characters.",
            advice=f"1 to {LONGEST_QUESTION} are allowed.",
        )
    scene = _typed(content, "scene", (int, type(None)), Chosen.scene)
    if scene is not None and not 0 <= scene < 2**31:
        raise InputError(f"'scene' is {scene}.", advice=f"Give 0 to {2**31 - 1}, or null.")
    return Chosen(model, _methods(content), question, scene, _generate(content, most_tokens))


def _object(text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The settings are no JSON: {error}.", advice="Give a file that this page wrote."
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"The settings are a JSON {type(content).__name__}, not an object.",
            advice="Give a file that this page wrote.",
        )
    return content


def _methods(content: Mapping[str, Any]) -> tuple[str, ...]:
    texts = _typed(content, "methods", (list,), [])
    if len(texts) > COLUMNS or not all(isinstance(text, str) for text in texts):
        raise InputError(
            f"'methods' is {texts!r}.", advice=f"Give a list of at most {COLUMNS} texts."
        )
    for number, text in enumerate(texts, 1):
        try:
            read_methods(text)
        except MmlmError as error:
            raise InputError(f"Method {number}: {error}", advice=error.advice) from error
    return tuple(texts)


def _generate(content: Mapping[str, Any], most_tokens: int) -> dict[str, Any]:
    given = _typed(content, "generate", (dict,), {})
    _refuse_unknown(given, _ASKED, "generate.")
    values = _defaults()
    for name, default in _defaults().items():
        kinds = (int, float) if isinstance(default, float) else (type(default),)
        values[name] = _typed(given, name, kinds, default, "generate.")
    generate_settings(values, most_tokens)
    return values


def _refuse_unknown(content: Mapping[str, Any], known: Sequence[str], prefix: str) -> None:
    for name in content:
        if name not in known:
            raise InputError(
                f"The settings have an unknown entry {prefix + name!r}.",
                advice=closest(name, known) or f"Known: {', '.join(known)}.",
            )


def _typed(
    content: Mapping[str, Any],
    name: str,
    kinds: tuple[type, ...],
    default: Any,
    prefix: str = "",
) -> Any:
    value = content.get(name, default)
    # True is an int for Python, and no number for people.
    if type(value) not in kinds:
        wanted = " or ".join("null" if kind is type(None) else kind.__name__ for kind in kinds)
        raise InputError(f"{prefix + name!r} is {value!r}.", advice=f"It must be {wanted}.")
    return value
