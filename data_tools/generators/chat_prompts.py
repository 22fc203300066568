"""What a server is sent to go on with a caption, and what sentence is read from its reply."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import warnings
from typing import Any, Literal

from PIL import Image

from data_tools.generators import Sample, SentenceRequest
from data_tools.pictures import Picture
from mmlm.chat_server.wire import Choice, valid_text

__all__ = [
    "OPEN_TURN",
    "STOPS",
    "SERVER_STOPS",
    "ContinueMode",
    "as_sample",
    "chat_messages",
    "data_url",
    "first_sentence",
    "png_url",
    "seed_of",
]

ContinueMode = Literal["auto", "prefill", "ask"]

OPEN_TURN: dict[str, Any] = {"continue_final_message": True, "add_generation_prompt": False}
"""Leaves the assistant's last turn open: vLLM, SGLang, llama.cpp (which does so by itself, too)."""

STOPS = [mark + blank for mark in ".!?" for blank in (" ", "\n")]
"""Where a server may stop: a closing mark counts once a blank follows, so "3.5" is no end."""

SERVER_STOPS: dict[str, Any] = {
    "stop": STOPS,
    "include_stop_str_in_output": True,  # vLLM's name for it
    "no_stop_trim": True,  # SGLang's
}

_SENTENCE_END = re.compile(r"[.!?](?=\s|$)")
_ENDED = ("stop", "eos_token")  # the second one is TGI's
_PLAIN_MODES = ("RGB", "L")
_ORIENTATION = 0x0112  # the EXIF tag
_ASK_TO_CONTINUE = (
    "{question}\n\nYour answer so far:\n{context}\n\n"
    "Write only what comes next in this answer, without repeating any of it."
)


def data_url(picture: Picture) -> str:
    """A picture as a data URL.

    The bytes of the file where every reader sees the same pixels in them: PNG or JPEG, RGB or grey
    of 8 bits, nothing transparent, not turned by its EXIF record. Otherwise, or if the file is not
    what it was when it was read, the decoded pixels as PNG.
    """
    try:
        content = picture.path.read_bytes()
    except OSError:  # gone since it was read: the pixels are still there
        return png_url(picture.image)
    if hashlib.sha256(content).hexdigest() != picture.sha256:
        return png_url(picture.image)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # large pictures: they were decoded before
        image = Image.open(io.BytesIO(content))
    with image:
        plain = (
            image.format in ("PNG", "JPEG")
            and image.mode in _PLAIN_MODES
            and "transparency" not in image.info
            and image.getexif().get(_ORIENTATION, 1) == 1
        )
        kind = f"image/{str(image.format).lower()}"
    return _url(kind, content) if plain else png_url(picture.image)


def png_url(image: Image.Image) -> str:
    """Pixels as a data URL."""
    stream = io.BytesIO()
    image.save(stream, "PNG")
    return _url("image/png", stream.getvalue())


def _url(kind: str, content: bytes) -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def chat_messages(
    url: str, question: str, context: str, mode: ContinueMode
) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The conversation, and the further fields that it needs.

    Args:
        url: The picture.
        question: What the user asks.
        context: The answer so far; "" at its beginning.
        mode: "ask" puts the answer so far into the question; otherwise it is an open turn.
    """
    context = valid_text(context)
    if context and mode == "ask":
        question = _ASK_TO_CONTINUE.format(question=question, context=context)
    parts = [
        {"type": "image_url", "image_url": {"url": url}},
        {"type": "text", "text": valid_text(question)},
    ]
    messages: list[dict[str, Any]] = [{"role": "user", "content": parts}]
    if not context or mode == "ask":
        return messages, {}
    # Plain text, not parts: servers put it behind the rendered prompt as it is.
    return [*messages, {"role": "assistant", "content": context}], dict(OPEN_TURN)


def first_sentence(text: str) -> tuple[str, str] | None:
    """The text up to its first closing mark, and what follows; None if there is no mark.

    A mark counts if white space follows, or nothing.
    """
    found = _SENTENCE_END.search(text.strip())
    if found is None:
        return None
    return text.strip()[: found.end()], text.strip()[found.end() :]


def as_sample(choice: Choice, echo: str = "") -> Sample:
    """One reply as a sample: its first sentence, wherever the server stopped.

    Args:
        choice: The reply.
        echo: What the server repeats before it goes on; "" if it does not.

    Returns:
        Without text and not finished if no sentence ended before the token limit, or the model
        would not reply.
    """
    text = (choice.text or "").lstrip().removeprefix(echo)
    by_itself = choice.finish in _ENDED and not choice.refused
    # A blank behind the mark shows that a stop sequence was met, where the server does not say so.
    by_itself = by_itself and choice.stopped_by is None and not text.endswith(tuple(STOPS))
    found = first_sentence(text)
    if found is None:
        whole = text.strip() if by_itself else ""
        return Sample(whole, by_itself)
    sentence, rest = found
    return Sample(sentence, by_itself and not rest)


def seed_of(request: SentenceRequest, number: int) -> int:
    """The seed that a server is sent, 0 to 2**31 - 1: what every server takes.

    Args:
        request: Whose samples are wanted.
        number: Counts the questions that are asked for it: every one gets a seed of its own.
    """
    digest = hashlib.sha256(f"{request.seed}:{number}".encode()).digest()
    return int.from_bytes(digest[:4], "big") >> 1
