"""Which characters of a rendered conversation the assistant says, for any chat template.

Where the template marks them itself (``{% generation %}``), its marks are taken. Otherwise the
conversation is rendered turn by turn: what the template adds between "the assistant is about to
speak" and "the assistant has spoken" is the answer. That is exact if the template only ever appends
(it is *prefix-stable*), which is checked for every conversation, and refused if it does not hold.

An answer ends with the end token that the template writes behind it: without it a model never
learns to stop.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from mmlm.answers import closing_tokens
from mmlm.errors import InputError
from mmlm.inputs import Message, use_chat_template
from mmlm.interleaving import in_prompt_order

__all__ = ["EndToken", "Rendered", "Renderer"]

EndToken: TypeAlias = Literal["template", "eos", "none"]
"""Where the end token of an answer comes from: the template, which must write one; the tokenizer's
EOS where the template writes none; or nowhere, if the template writes none."""

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Rendered:
    """A conversation as text.

    Attributes:
        text: What the template prints, image placeholders not expanded yet.
        spans: Start and end (characters) of every answer in it, its end token included.
        headers: Likewise of the assistant's header before each answer, None where the template
            writes none of its own; empty if nobody asks for them.
    """

    text: str
    spans: tuple[tuple[int, int], ...]
    headers: tuple[tuple[int, int] | None, ...] = ()


class Renderer:
    """Renders conversations and finds the assistant's answers in them.

    Args:
        processor: A Hugging Face processor with a chat template.
        end_token: See `EndToken`.
        headers: Whether the assistant's headers are wanted too.

    Raises:
        InputError: If the processor has no chat template.
    """

    def __init__(
        self, processor: Any, end_token: EndToken = "template", *, headers: bool = False
    ) -> None:
        self._template = _Template(processor)
        self._headers = headers
        self._image_token = getattr(processor, "image_token", None)
        self._end_token = end_token

    def __call__(self, messages: Sequence[Message]) -> Rendered:
        """The text of a conversation, and one span per assistant message.

        Args:
            messages: Chat messages with lists of segments; every assistant message is one text.

        Raises:
            InputError: If the template refuses the messages, changes an answer, is not
                prefix-stable, or writes no end token although it should.
        """
        template = self._template
        messages = in_prompt_order(messages, template, self._image_token)
        answers = [one["content"][0]["text"] for one in messages if one["role"] == "assistant"]
        if _GENERATION.search(template.source):
            text, spans = template.marked(messages)
            spans = _with_closing(template, text, spans)
        else:
            text, spans = _turn_by_turn(template, messages)
        if len(spans) != len(answers):
            raise InputError(
                f"The chat template marks {len(spans)} answers in a conversation of "
                f"{len(answers)}.",
                advice="Its {% generation %} block must stand once around every assistant message.",
            )
        lengths = _header_lengths(template, messages, text, spans) if self._headers else []
        # From the last to the first, so that an inserted end token moves no span still to be read.
        exact: list[tuple[int, int]] = []
        for answer, (start, stop) in reversed(list(zip(answers, spans, strict=True))):
            text, end, gained = _ended(template, text, start, stop, answer.strip(), self._end_token)
            exact = [(start, end), *((s + gained, e + gained) for s, e in exact)]
        headers = [
            None if n is None else (start - n, start)
            for (start, _), n in zip(exact, lengths, strict=False)
        ]
        return Rendered(text, tuple(exact), tuple(headers))


class _Template:
    """A processor's chat template, rendered by transformers' own function."""

    def __init__(self, processor: Any) -> None:
        use_chat_template(processor, "model")
        source = processor.chat_template or processor.tokenizer.chat_template
        if isinstance(source, dict):
            if "default" not in source:
                raise InputError(
                    f"The processor has the chat templates {', '.join(source)}, none is default.",
                    advice="Give one: chat_template: simple, or the path of a Jinja file.",
                )
            source = source["default"]
        self.source: str = source
        self.specials = dict(processor.tokenizer.special_tokens_map)
        self.eos: str | None = processor.tokenizer.eos_token
        self.closing = closing_tokens(processor).pattern

    def __call__(self, messages: Sequence[Message], speak: bool = False) -> str:
        return self._render(messages, add_generation_prompt=speak)[0][0]

    def marked(self, messages: Sequence[Message]) -> tuple[str, list[tuple[int, int]]]:
        """The text, and the spans that ``{% generation %}`` marks."""
        texts, spans = self._render(messages, return_assistant_tokens_mask=True)
        return texts[0], [(start, end) for start, end in spans[0]]

    def _render(self, messages: Sequence[Message], **options: bool) -> Any:
        from jinja2.exceptions import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            return render_jinja_template(
                [list(messages)], chat_template=self.source, **options, **self.specials
            )
        except TemplateError as error:
            raise InputError(
                f"The chat template refuses the conversation: {error}.",
                advice="Check the roles and their order; some templates know no system message.",
            ) from error


def _turn_by_turn(
    template: _Template, messages: Sequence[Message]
) -> tuple[str, list[tuple[int, int]]]:
    text = template(messages)
    spans: list[tuple[int, int]] = []
    for place, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        before = template(messages[:place], speak=True)
        spoken = template(messages[: place + 1])
        for earlier, later in ((before, spoken), (spoken, text)):
            if not later.startswith(earlier):
                raise _not_stable(place, earlier, later)
        spans.append((len(before), len(spoken)))
    return text, spans


def _header_lengths(
    template: _Template,
    messages: Sequence[Message],
    text: str,
    spans: Sequence[tuple[int, int]],
) -> list[int | None]:
    """Characters between the end of each question and its answer, None where that is unknown."""
    found: list[int | None] = []
    places = [n for n, message in enumerate(messages) if message["role"] == "assistant"]
    for place, (start, _) in zip(places, spans, strict=True):
        asked = template(messages[:place])
        known = text.startswith(asked) and len(asked) < start
        found.append(start - len(asked) if known else None)
    return found


def _not_stable(place: int, earlier: str, later: str) -> InputError:
    same = next(
        (i for i, (a, b) in enumerate(zip(earlier, later, strict=False)) if a != b),
        min(len(earlier), len(later)),
    )
    return InputError(
        f"The chat template is not prefix-stable: around turn {place + 1} it first prints "
        f"{earlier[same : same + 40]!r} and then, with the conversation going on, "
        f"{later[same : same + 40]!r}. What the assistant says cannot be told from that.",
        advice="Give a template that marks answers with {% generation %}, or one that only appends "
        "(chat_template: simple).",
    )


def _with_closing(
    template: _Template, text: str, spans: list[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Takes in the end token if the template's marks stop just before it.

    What closes a turn is read off the last one, behind which nothing else can stand.
    """
    closing = re.compile(template.closing).match(text, spans[-1][1]) if spans else None
    if closing is None:
        return spans
    end = closing[0]
    return [(s, e + len(end) if text.startswith(end, e) else e) for s, e in spans]


def _ended(
    template: _Template, text: str, start: int, stop: int, answer: str, end_token: EndToken
) -> tuple[str, int, int]:
    """The exact end of an answer: text (perhaps with an end token put in), end, and its growth."""
    closed = re.compile(re.escape(answer) + template.closing).search(text, start, stop)
    if closed is not None:
        return text, closed.end(), 0
    found = text.find(answer, start, stop)
    if found < 0:
        raise InputError(
            f"The chat template changes an answer: {answer[:60]!r} became "
            f"{text[start:stop][:80]!r}.",
            advice="Give a template that prints answers as they are (chat_template: simple).",
        )
    end = found + len(answer)
    if end_token == "none":
        return text, end, 0
    if end_token == "eos" and template.eos:
        return text[:end] + template.eos + text[end:], end + len(template.eos), len(template.eos)
    raise InputError(
        "The chat template writes no end token behind an answer: the model would never learn to "
        "stop.",
        advice="Give end_token: eos (the tokenizer's EOS is written there), another template "
        "(chat_template: simple), or end_token: none if that is meant.",
    )
