"""From pictures and messages to model inputs: chat template, left padding.

Works with the processor of any Hugging Face vision-language model: the processor itself expands
the image placeholder of its chat template. Only PaliGemma is known by name: its prompts always
have a picture, and its ``token_type_ids`` of zeros mean something.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

from PIL import Image

from mmlm.errors import InputError
from mmlm.images import MAX_PIXELS, ImageSource, load_image
from mmlm.interleaving import in_prompt_order

if TYPE_CHECKING:
    import torch

__all__ = [
    "MAX_PIXELS",
    "SIMPLE_TEMPLATE",
    "ImageSource",
    "Message",
    "has_chat_template",
    "load_image",
    "message",
    "prepare",
    "render",
    "unknown_words",
    "use_chat_template",
]

Message: TypeAlias = dict[str, Any]

SIMPLE_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'].upper() }}: "
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""LLaVA-1.5's prompt, ``USER: <image>\\nQUESTION ASSISTANT:``, with the processor's image token."""

_IMAGE_MARK = re.compile(r"<image ([1-9]\d*)>")


def message(role: str, text: str, n_images: int = 0, *, marked: bool = False) -> Message:
    """One message in Hugging Face chat format, its pictures before or inside its text.

    Args:
        role: ``user`` or ``assistant`` (or whatever the chat template knows).
        text: The text.
        n_images: How many picture placeholders the message has.
        marked: Whether the text says where they stand: ``<image 1>``, ``<image 2>`` and so on, in
            this order. A mark that comes again stays text: it only names the picture. Otherwise
            all of them stand before the text, and a mark is text like any other.

    Raises:
        InputError: If the marks are not those of the pictures, or not in order.
    """
    if marked:
        return {"role": role, "content": _at_marks(text, n_images)}
    pictures = [{"type": "image"}] * n_images
    return {"role": role, "content": [*pictures, {"type": "text", "text": text}]}


def _at_marks(text: str, n_images: int) -> list[dict[str, str]]:
    parts: list[dict[str, str]] = []
    start = shown = 0
    for mark in _IMAGE_MARK.finditer(text):
        number = int(mark[1])
        if number <= shown:
            continue  # shown before
        shown += 1
        if number != shown:
            break
        if before := text[start : mark.start()]:
            parts.append({"type": "text", "text": before})
        parts.append({"type": "image"})
        start = mark.end()
    else:
        if shown == n_images:
            rest = text[start:]
            return [*parts, {"type": "text", "text": rest}] if rest or not parts else parts
    marks = ", ".join(mark[0] for mark in _IMAGE_MARK.finditer(text)) or "no marks"
    raise InputError(
        f"A prompt with {n_images} pictures has {marks}.",
        advice="Mark every picture once, in order: <image 1>, <image 2>, ...",
    )


def use_chat_template(processor: Any, template: str) -> None:
    """Gives a processor a chat template, or makes sure that it has its own.

    Args:
        processor: Changed in place.
        template: ``model`` (the processor's own), ``simple`` (:data:`SIMPLE_TEMPLATE`), or the
            path of a Jinja file.

    Raises:
        InputError: If the file cannot be read, or the processor has no template of its own.
    """
    if template == "simple":
        image_token = getattr(processor, "image_token", None) or "<image>"
        processor.chat_template = SIMPLE_TEMPLATE.replace("<image>", image_token)
    elif template != "model":
        try:
            processor.chat_template = Path(template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"The chat template {template!r} cannot be read: {error}.",
                advice="Give `model`, `simple`, or the path of a Jinja file.",
            ) from error
    if not has_chat_template(processor):
        raise InputError(
            f"{type(processor).__name__} has no chat template.",
            advice="Give --model.chat_template simple, or the path of a Jinja file "
            "(in Python: mmlm.inputs.use_chat_template).",
        )


def has_chat_template(processor: Any) -> bool:
    """Whether the processor, or its tokenizer, knows how a conversation is written down."""
    return bool(_template(processor))


def _template(processor: Any) -> Any:
    return processor.chat_template or getattr(processor.tokenizer, "chat_template", None)


def render(processor: Any, conversation: Sequence[Message], *, open_turn: bool = True) -> str:
    """The text of a conversation after templating, ending where the answer begins.

    Pictures stay where the messages have them, also if the template would print them first
    (:mod:`mmlm.interleaving`).

    Args:
        processor: A Hugging Face processor with a chat template.
        conversation: The messages.
        open_turn: Whether the assistant's turn is opened behind them; False if they end with it.

    Raises:
        InputError: If the processor has no chat template, or the template refuses the messages.
    """
    from jinja2.exceptions import TemplateError

    use_chat_template(processor, "model")

    def template(messages: Sequence[Message]) -> str:
        return processor.apply_chat_template(
            list(messages),
            chat_template=_template(processor),
            tokenize=False,
            add_generation_prompt=open_turn,
        )

    try:
        image_token = getattr(processor, "image_token", None)
        return template(in_prompt_order(conversation, template, image_token))
    except TemplateError as error:
        raise InputError(
            f"The chat template refuses the conversation: {error}.",
            advice="Check the roles and their order; most templates want user and assistant in "
            "turn, starting with user.",
        ) from error


def prepare(
    processor: Any,
    conversations: Sequence[Sequence[Message]],
    images: Sequence[Sequence[Image.Image]],
    device: str | torch.device = "cpu",
    dtype: torch.dtype | None = None,
    *,
    begun: Sequence[str] = (),
) -> dict[str, torch.Tensor]:
    """Turns a batch of conversations into inputs for ``model.generate``.

    Args:
        processor: A Hugging Face processor with a chat template.
        conversations: One list of messages per row, in Hugging Face chat format.
        images: The pictures of each row, in the order of its placeholders.
        device: Where the tensors go.
        dtype: Number format of the pixels; default: as the processor makes them.
        begun: What each answer begins with, with the blank before it if it needs one: it is put
            behind the template's text, in a turn that stays open. Default: nothing.

    Returns:
        The processor's tensors: ``input_ids`` and ``attention_mask`` [B, N], padded on the left,
        and the pixels under the names that the model expects.

    Raises:
        InputError: If pictures and placeholders do not match in number, there is no row, the
            processor has no chat template, or a prompt for PaliGemma has no picture.
    """
    if not conversations or len(conversations) != len(images):
        raise InputError(
            f"{len(conversations)} conversations and {len(images)} lists of pictures were given.",
            advice="Give at least one conversation, and one list of pictures for each.",
        )
    for row, (conversation, pictures) in enumerate(zip(conversations, images, strict=True)):
        _check_pictures(row, conversation, pictures)
    if _is_paligemma(processor) and not all(images):
        raise InputError(
            "PaliGemma answers questions about pictures only: its processor would write a prompt "
            "without a picture wrongly.",
            advice="Give every question a picture, or use another model.",
        )
    texts = [render(processor, conversation) for conversation in conversations]
    if begun:
        texts = [text + start for text, start in zip(texts, begun, strict=True)]
    options: dict[str, Any] = {"return_tensors": "pt", "padding": True, "padding_side": "left"}
    if _starts_with_bos(processor, texts[0]):
        # The template wrote it already; the tokenizer would add a second one.
        options["add_special_tokens"] = False
    nested = [list(pictures) for pictures in images] if any(images) else None
    batch = processor(text=texts, images=nested, **options)
    if _is_paligemma(processor):
        batch.pop("labels", None)  # made for prompts too
    elif "token_type_ids" in batch and not batch["token_type_ids"].any():
        # Many fast tokenizers make them, and most models refuse them.
        batch.pop("token_type_ids")
    return dict(batch.to(device) if dtype is None else batch.to(device, dtype))


def _check_pictures(
    row: int, conversation: Sequence[Message], pictures: Sequence[Image.Image]
) -> None:
    n_placeholders = sum(
        part["type"] == "image"
        for one in conversation
        if isinstance(one["content"], list)
        for part in one["content"]
    )
    if n_placeholders != len(pictures):
        raise InputError(
            f"Row {row} has {n_placeholders} image placeholders and {len(pictures)} pictures.",
            advice='Put one {"type": "image"} part per picture into the messages.',
        )


def _is_paligemma(processor: Any) -> bool:
    return type(processor).__name__ == "PaliGemmaProcessor"


def _starts_with_bos(processor: Any, text: str) -> bool:
    bos = getattr(processor.tokenizer, "bos_token", None)
    return bos is not None and text.startswith(bos)


def unknown_words(processor: Any, text: str) -> list[str]:
    """Words of a text that the tokenizer does not know, in order, each once.

    A subword tokenizer knows every word. The embedded model's vocabulary is a list of words:
    everything else reaches the model as one and the same "unknown" token.

    Args:
        processor: A Hugging Face processor with a fast tokenizer.
        text: What the user wrote.
    """
    tokenizer = processor.tokenizer
    if tokenizer.unk_token_id is None or not tokenizer.is_fast:
        return []
    encoded: Mapping[str, Any] = tokenizer(
        text, add_special_tokens=False, return_offsets_mapping=True
    )
    spans = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
    found = [text[slice(*span)].strip() for token, span in spans if token == tokenizer.unk_token_id]
    return list(dict.fromkeys(word for word in found if word))
