"""What a chat template writes around an answer: before it, between prompt and answer, behind it.

Who goes on with an answer, trains on one, or writes one down for another program must put the same
text there, or the model reads other tokens than it generates.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from mmlm.inputs import Message, message, render

__all__ = ["AnswerFrame", "answer_frame", "answer_joiner", "closing_tokens", "prompt_is_apart"]

_ANSWER = "x-answer-x"  # stands for an answer while the template is asked what it writes around one


class AnswerFrame(NamedTuple):
    r"""The text around an answer.

    Attributes:
        prompt: The conversation up to the answer, as `mmlm.inputs.render` writes it.
        joiner: What stands between it and the answer: " " behind ``ASSISTANT:``, nothing behind
            ``assistant\n``.
        closing: What ends the answer: the special token that the template writes behind one, else
            the tokenizer's end token; "" if there is neither.
    """

    prompt: str
    joiner: str
    closing: str


def answer_frame(processor: Any, asked: Sequence[Message]) -> AnswerFrame:
    """The text around the answer to a conversation, taken from the chat template.

    The template is given an answer, and what it writes before and behind it is read off. A template
    that writes a finished conversation in another way than an open one cannot be asked for the
    joiner: then a blank, unless its text ends with white space.

    Args:
        processor: A Hugging Face processor with a chat template.
        asked: The conversation up to the answer, in chat format.

    Raises:
        InputError: If there is no chat template, or it refuses the conversation.
    """
    before = render(processor, asked)
    whole = render(processor, [*asked, message("assistant", _ANSWER)], open_turn=False)
    behind = whole.rpartition(_ANSWER)[2] if _ANSWER in whole else ""
    found = closing_tokens(processor).match(behind)
    closing = found[0] if found else processor.tokenizer.eos_token or ""
    return AnswerFrame(before, _joiner(processor, before, whole), closing)


def answer_joiner(processor: Any, asked: Sequence[Message]) -> str:
    """What stands between a prompt and the answer to it; see `answer_frame`."""
    return answer_frame(processor, asked).joiner


def prompt_is_apart(processor: Any) -> bool:
    """Whether prompts and answers are two texts to the tokenizer and to attention (PaliGemma)."""
    return type(processor).__name__ == "PaliGemmaProcessor"


def _joiner(processor: Any, before: str, whole: str) -> str:
    if whole.startswith(before):
        between, found, _ = whole[len(before) :].partition(_ANSWER)
        if found and not between.strip():
            return between
    return "" if before != before.rstrip() or prompt_is_apart(processor) else " "


def closing_tokens(processor: Any) -> re.Pattern[str]:
    """Special tokens that may end an answer, with the white space that a template puts before."""
    tokenizer = processor.tokenizer
    never = {getattr(processor, "image_token", None), tokenizer.bos_token, ""}
    names = {*tokenizer.all_special_tokens, *tokenizer.get_added_vocab()} - never
    # The longest first, so that no token is taken for the beginning of another.
    either = "|".join(map(re.escape, sorted(names, key=len, reverse=True)))
    return re.compile(rf"\s*(?:{either})" if either else r"(?!)")
