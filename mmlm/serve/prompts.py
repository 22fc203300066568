"""From the messages of a request to model inputs, checked before the request waits for the model.

Pictures are decoded and the processor runs once for the request alone. What it refuses is so known
at once, and of this request; what remains for the model's thread cannot concern anybody's input.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmlm.answers import answer_joiner, prompt_is_apart
from mmlm.errors import MmlmError
from mmlm.images import load_image
from mmlm.inputs import Message, prepare
from mmlm.serve.limits import Limits
from mmlm.serve.refusals import invalid, unfit
from mmlm.serve.wire import ChatRequest, ImagePart

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["Prepared", "Preparer", "picture_parts"]


@dataclass(frozen=True, eq=False)
class Prepared:
    """What the model is asked.

    Attributes:
        conversation: The messages in Hugging Face chat format, up to the answer.
        pictures: Its pictures, in the order of its placeholders.
        begun: What the answer begins with.
        inputs: The processor's tensors for this request alone, on the CPU.
        n_tokens: Length of the prompt, pictures included.
        max_tokens: Most new tokens of the answer.
    """

    conversation: tuple[Message, ...]
    pictures: tuple[Image.Image, ...]
    begun: str
    inputs: Mapping[str, torch.Tensor]
    n_tokens: int
    max_tokens: int


def picture_parts(request: ChatRequest) -> list[tuple[str, str]]:
    """Every picture's field in the request, and its address."""
    return [
        (f"messages.{m}.content.{p}.image_url", part.image_url.url)
        for m, message in enumerate(request.messages)
        for p, part in enumerate(message.parts)
        if isinstance(part, ImagePart)
    ]


class Preparer:
    """Prepares requests; not for several threads at a time.

    Args:
        processor: The model's. A copy is used: fast tokenizers keep the padding they were asked
            for, so that two threads must not share one.
        room: Positions of the model; None if it does not say.
        limits: What a request may cost.
    """

    def __init__(self, processor: Any, room: int | None, limits: Limits) -> None:
        self._processor = copy.deepcopy(processor)
        self._room = room
        self._limits = limits
        self._marks = _special_tokens(self._processor)

    def __call__(self, request: ChatRequest, files: Sequence[tuple[str, bytes]]) -> Prepared:
        """Prepares a request.

        Args:
            request: The request.
            files: The bytes of its pictures with the fields they came from, in order.

        Raises:
            Refusal: If a picture or a text cannot be used, or all is too long.
        """
        messages = [self._message(n, message) for n, message in enumerate(request.messages)]
        pictures = self._pictures(files)
        begun = ""
        try:
            if request.continue_final_message:
                *messages, last = messages
                begun = self._begun(messages, last)
            inputs = prepare(
                self._processor, [messages], [pictures], begun=[begun] if begun else ()
            )
        except MmlmError as error:
            raise unfit(error, "messages") from None
        # What processors say to what they cannot use, e.g. to a picture of 1 x 1000 pixels, and
        # templates to a role of which they expect something else.
        except (TypeError, ValueError, ZeroDivisionError) as error:
            message = f"The model's processor refuses the request: {error}."
            raise invalid(message, "messages") from None
        n_tokens = inputs["input_ids"].shape[1]
        most = self._room_for(n_tokens, request.max_completion_tokens or request.max_tokens)
        return Prepared(tuple(messages), tuple(pictures), begun, inputs, n_tokens, most)

    def _message(self, number: int, message: Any) -> Message:
        role = "system" if message.role == "developer" else message.role
        content: list[dict[str, str]] = []
        for place, part in enumerate(message.parts):
            if isinstance(part, ImagePart):
                content.append({"type": "image"})
                continue
            for mark in self._marks:
                if mark in part.text:
                    raise invalid(
                        f"The text holds {mark!r}, which the model reads as a sign of its own and "
                        "not as text. Write it differently, e.g. with a blank in it.",
                        f"messages.{number}.content.{place}.text",
                        "special_token",
                    )
            content.append({"type": "text", "text": part.text})
        return {"role": role, "content": content}

    def _pictures(self, files: Sequence[tuple[str, bytes]]) -> list[Image.Image]:
        pictures, left = [], self._limits.pixels
        for param, content in files:
            try:
                pictures.append(load_image(content, max_pixels=left))
            except MmlmError as error:
                raise unfit(error, param, "invalid_image") from None
            left -= pictures[-1].width * pictures[-1].height
        return pictures

    def _begun(self, asked: list[Message], last: Message) -> str:
        if prompt_is_apart(self._processor) or not asked:
            raise invalid("This model cannot go on with an answer that has begun.", "messages")
        text = "".join(part.get("text", "") for part in last["content"])
        return answer_joiner(self._processor, asked) + text

    def _room_for(self, n_tokens: int, asked: int | None) -> int:
        """Most new tokens: as many as were asked for, or what there is room for."""
        limits, room = self._limits, self._room or n_tokens + self._limits.max_tokens
        longest = min(limits.prompt_tokens or room, room - 1)
        if n_tokens > longest:
            raise invalid(
                f"The prompt has {n_tokens} tokens, pictures included; at most {longest} are "
                "taken. Send less text, or fewer or smaller pictures.",
                "messages",
                "context_length_exceeded",
            )
        most = min(limits.max_tokens, room - n_tokens)
        if asked is not None and asked > most:
            raise invalid(
                f"{asked} new tokens are asked for; behind this prompt of {n_tokens} there may be "
                f"at most {most}.",
                "max_tokens",
                "context_length_exceeded",
            )
        return asked or most


def _special_tokens(processor: Any) -> tuple[str, ...]:
    """What may not stand in a text: the tokenizer would not read it as text.

    A placeholder in a text would take the picture of a later one; in a batch, of another client.
    """
    tokenizer = processor.tokenizer
    named = {getattr(processor, f"{kind}_token", None) for kind in ("image", "video", "audio")}
    added = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return tuple(sorted({*named, *added, *tokenizer.all_special_tokens} - {None, ""}, key=len))
