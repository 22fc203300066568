"""Where the model looked at every word of an answer: before a method, and after it.

An answer that was given is **followed**: the model generates again and is made to write the same
tokens, once with each column's methods. So all columns are asked the same thing (where do you look
when you are about to write this word, after these words?), and what each would have written
instead is known as well. Nothing is measured while answers stream; their times are those of the
methods alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import mmlm
from mmlm.errors import InputError

if TYPE_CHECKING:
    from mmlm.engine.method import Method
    from mmlm.show.conversation import Conversation
    from mmlm.show.looking import Look

__all__ = ["Gaze", "follow"]


@dataclass(frozen=True, eq=False)
class Gaze:
    """One set of methods following one answer.

    Attributes:
        look: Attention over the pictures, per token of the answer.
        chances: Per token: how probable it was, in [0, 1].
        favourites: Per token: the text of the most probable one ("" for the end of the answer).
    """

    look: Look
    chances: tuple[float, ...]
    favourites: tuple[str, ...]

    def first(self, start: int, end: int) -> int:
        """Number of the token with which a word of the answer begins.

        Raises:
            InputError: If no token wrote any of these characters.
        """
        if tokens := self.look.tokens_of(start, end):
            return tokens[0]
        raise InputError(
            f"The answer has no word from character {start} to {end}.",
            advice="Click a word of an answer.",
        )


def follow(
    model: Any,
    processor: Any,
    methods: Sequence[Method],
    asked: Conversation,
    token_ids: Sequence[int],
) -> Gaze:
    """Makes a model write an answer token by token, and notes where it looks.

    Args:
        model: A Hugging Face LVLM to which nothing is attached.
        processor: Its processor.
        methods: Attached meanwhile. Methods that search for an answer are left out: they choose
            between continuations, and here the answer is given.
        asked: The conversation, whose last question is open.
        token_ids: The answer, the end token included if it has one.

    Raises:
        InputError: If the conversation has no picture, or the answer no token.
        MmlmError: If the methods cannot be combined with a look at the attention.
    """
    from mmlm.decoding_settings import GenerateSettings, generation_config
    from mmlm.show import looking

    pictures = asked.pictures()
    if not pictures or not token_ids:
        raise InputError(
            "There is nothing to look at: the talk has no picture, or the answer no words.",
            advice="Drop a picture or draw a scene, and ask again.",
        )
    inputs = asked.inputs(model, processor)
    given = _given(token_ids, inputs["input_ids"].shape[1])
    methods = [method for method in methods if "search" not in method.sites]
    settings = GenerateSettings(max_new_tokens=len(token_ids))
    with mmlm.attach(model, *methods, mmlm.AttentionMap(), processor=processor):
        model.generate(
            **inputs,
            generation_config=generation_config(model, settings),
            logits_processor=[given],
        )
        [record] = mmlm.measured(model, [len(token_ids)])
    look = looking.look(model, processor, pictures, token_ids, record[mmlm.AttentionMap.measures])
    favourites = [processor.decode([token], skip_special_tokens=True) for token in given.best]
    return Gaze(look, tuple(given.chances), tuple(text.strip() for text in favourites))


def _given(token_ids: Sequence[int], prompt: int) -> Any:
    """A logits processor that allows the given tokens only, and keeps what it was shown."""
    import torch
    from transformers import LogitsProcessor

    class Given(LogitsProcessor):
        def __init__(self) -> None:
            self.chances: list[float] = []
            self.best: list[int] = []

        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            token = token_ids[input_ids.shape[1] - prompt]
            self.chances.append(float(scores[0].float().softmax(-1)[token]))
            self.best.append(int(scores[0].argmax()))
            only = torch.full_like(scores, -torch.inf)
            only[:, token] = 0.0
            return only

    return Given()
