"""Pictures that stay where the prompt has them, whatever the chat template does with them.

Some templates, LLaVA-1.5's among them, print all pictures of a message first and its text after
them. "Image1: <picture> Image2: <picture> ..." then reaches the model as two pictures and two names
of which none belongs to either.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mmlm.errors import InputError

__all__ = ["in_prompt_order"]

_BEFORE, _AFTER = "before the picture", "after the picture"
_PROBE = [
    {
        "role": "user",
        "content": [
            {"type": "text", "text": _BEFORE},
            {"type": "image"},
            {"type": "text", "text": _AFTER},
        ],
    }
]


def in_prompt_order(
    conversation: Sequence[dict[str, Any]],
    template: Callable[[Sequence[dict[str, Any]]], str],
    image_token: str | None,
) -> list[dict[str, Any]]:
    """A conversation that the template renders with every picture where it is in the message.

    Messages without a text before a picture, and templates that keep the order, are left alone.
    Otherwise the message becomes one text with the image token written out, which the processor
    expands as it expands its own.

    Args:
        conversation: Messages in Hugging Face chat format.
        template: Renders a conversation.
        image_token: The processor's image token.

    Returns:
        The messages to be rendered instead.

    Raises:
        InputError: If the template moves pictures and the processor names no image token.
    """
    if not any(map(_has_picture_after_text, conversation)) or _keeps_order(template):
        return list(conversation)
    if not image_token:
        raise InputError(
            "The chat template moves the pictures of a prompt before its text, and the processor "
            "does not say how a picture is written.",
            advice="Give a chat template that keeps the order: --model.chat_template simple.",
        )
    return [
        _written_out(one, image_token) if _has_picture_after_text(one) else one
        for one in conversation
    ]


def _has_picture_after_text(message: dict[str, Any]) -> bool:
    content = message["content"]
    if isinstance(content, str):
        return False
    kinds = [part["type"] for part in content]
    return "text" in kinds and "image" in kinds[kinds.index("text") :]


def _keeps_order(template: Callable[[Sequence[dict[str, Any]]], str]) -> bool:
    text = template(_PROBE)
    start, end = text.find(_BEFORE), text.find(_AFTER)
    return 0 <= start < end and bool(text[start + len(_BEFORE) : end].strip())


def _written_out(message: dict[str, Any], image_token: str) -> dict[str, Any]:
    text = "".join(
        image_token if part["type"] == "image" else part["text"] for part in message["content"]
    )
    return {**message, "content": [{"type": "text", "text": text}]}
