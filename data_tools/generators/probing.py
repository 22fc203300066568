"""What a server makes of open turns, stop sequences and `n`, found out with a few questions.

Nothing in the interface says whether a server goes on with an assistant's turn or starts a new
answer, and a server that starts a new one would fill a data set with first sentences. So it is
tried, with a picture of our own and at temperature 0: the model answers, is then given the first
words of its own answer as an open turn, and must say the words that followed them. This works with
any model, however weak.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from PIL import Image, ImageDraw

from data_tools.generators import GeneratorError
from data_tools.generators.chat_prompts import SERVER_STOPS, ContinueMode, chat_messages, png_url
from mmlm.chat_server.wire import Choice
from mmlm.errors import InputError

__all__ = ["Ask", "Habits", "Split", "find_habits", "split_answer"]

_TOKENS = 24
_QUESTION = "Describe this image in detail."
_STRANGE = "Nevertheless, seven violins"  # no model begins a description like this by itself

Ask = Callable[[list[dict[str, Any]], Mapping[str, Any], int], list[Choice]]
"""Asks the server: (messages, fields that replace the usual ones, most new tokens) -> replies.

Raises GeneratorError for a request that it refuses, InputError if there is no hope for others.
"""


@dataclass(frozen=True)
class Habits:
    """What was found out.

    Attributes:
        knows_n: It gives several replies to one request, and they differ. (SGLang in deterministic
            mode draws all of them with the one seed of the request.)
        keeps_stops: It can stop behind a stop sequence and leave it in the text. One that cuts it
            off would take the mark from the sentence; it is asked without stop sequences, which
            costs tokens and changes nothing else.
        echoes: It repeats an open turn before it goes on.
    """

    knows_n: bool
    keeps_stops: bool = False
    echoes: bool = False


@dataclass(frozen=True)
class Split:
    """An answer, cut in two between words.

    Attributes:
        before: Its first words, without blank at the end.
        after: The words behind them.
    """

    before: str
    after: list[str]


def find_habits(ask: Ask, mode: ContinueMode) -> Habits:
    """Asks up to five short questions.

    Args:
        ask: The server.
        mode: "ask" takes nothing that needs a try; "auto" makes sure that open turns go on.

    Raises:
        InputError: If the server cannot be used; says why and what to do.
    """
    probe = _Probe(ask)
    knows_n = probe.knows_n()
    if mode == "ask":
        return Habits(knows_n)
    split = split_answer(probe.says(""))
    echoes = probe.says(_STRANGE).strip().startswith(_STRANGE)
    if mode == "auto":
        _check_continues(probe, split, echoes)
    return Habits(knows_n, split is not None and _keeps_stops(probe, split), echoes)


class _Probe:
    """Questions about a picture of our own."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        image = Image.new("RGB", (224, 224), "skyblue")
        draw = ImageDraw.Draw(image)
        draw.rectangle((0, 150, 224, 224), fill="seagreen")
        draw.ellipse((150, 20, 200, 70), fill="gold")
        self._url = png_url(image)

    def knows_n(self) -> bool:
        """Whether one request brings several replies that differ.

        A model so sure of itself that all are the same by chance is asked one by one, which costs
        time and changes nothing else. Refusing several is an answer, too.
        """
        messages, _ = chat_messages(self._url, _QUESTION, "", "ask")
        try:
            choices = self._ask(messages, {"n": 4, "temperature": 1.0}, _TOKENS)
        except GeneratorError:
            return False
        return len({choice.text for choice in choices}) > 1

    def says(self, context: str, **fields: Any) -> str:
        """What follows a beginning, at temperature 0."""
        messages, more = chat_messages(self._url, _QUESTION, context, "prefill")
        try:
            choices = self._ask(messages, {"n": 1, "temperature": 0.0, **more, **fields}, _TOKENS)
        except GeneratorError as error:
            raise InputError(
                f"The server refuses a simple question about a picture: {error}.",
                advice="Serve a vision-language model; a server that does not take the fields of "
                "vLLM needs continue_mode `ask`.",
            ) from error
        return choices[0].text or ""


def split_answer(answer: str) -> Split | None:
    """Cuts an answer near its middle, before a word that is new in it.

    Returns:
        None if there is no such place: the answer is too short.
    """
    words = [(found.group(), found.start()) for found in re.finditer(r"\S+", answer)]
    # Not before the last word: the token limit may have cut it.
    places = range(2, len(words) - 1)
    for place in sorted(places, key=lambda k: abs(2 * k - len(words))):
        word, start = words[place]
        if word not in answer[:start]:
            after = [text for text, _ in words[place:-1]]
            return Split(answer[:start].rstrip(), after)
    return None


def _check_continues(probe: _Probe, split: Split | None, echoes: bool) -> None:
    if split is not None:
        reply = probe.says(split.before).strip()
        if echoes:
            reply = reply.removeprefix(split.before)
        if reply.split()[:1] == split.after[:1]:
            return
        if reply.startswith(split.before):
            raise _refusal("starts a new answer where it should go on with one that has begun")
    raise _refusal("gives no clear sign whether it goes on with an answer that has begun")


def _refusal(what: str) -> InputError:
    return InputError(
        f"The server {what}.",
        advice="Use a server that knows `continue_final_message` (vLLM, SGLang, llama.cpp); or set "
        "continue_mode: `prefill` if you know that it goes on, `ask` to put the caption so far "
        "into the question, which is not the prompt that the model is trained with.",
    )


def _keeps_stops(probe: _Probe, split: Split) -> bool:
    word = split.after[0]
    try:
        reply = probe.says("", **SERVER_STOPS | {"stop": [word]})
    except InputError:  # refused with these fields, not without
        return False
    return reply.split() == [*split.before.split(), word]
