"""How the picture that is meant is named: prompts of several pictures in two manners of speaking.

``paper`` speaks as the authors do (Liu et al., arXiv 2410.17637, and their code). ``world`` says
the same in the words that the embedded model knows: its vocabulary is a list, "Image1" is not on
it, and numbers end with three.

A prompt is a list of segments, text and images in order, the content of a chat message. After a
picture at the very beginning no line break is written: where one belongs there, the model's chat
template prints it.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping
from typing import Literal

from data_tools.mia.layouts import SHAPES
from data_tools.mia.records import ALLOWED, PIP, SEQUENCE, Segment, check_number

__all__ = ["CENTRE_PHRASES", "Style", "centre_phrase", "numbers", "segments"]

Style = Literal["paper", "world"]

_OPENERS = ("For", "Regarding", "As for", "Concerning", "With respect to", "Considering")
_NOUNS = ("image", "picture", "photo", "subplot")
_PLACES = ("the {noun} in the center", "the central {noun}", "the {noun} in the middle",
           "the middle {noun}")  # fmt: skip

CENTRE_PHRASES: tuple[str, ...] = tuple(
    f"{opener} {place.format(noun=noun)}"
    for opener, noun, place in itertools.islice(itertools.product(_OPENERS, _NOUNS, _PLACES), 93)
)
"""93 ways to name the inner picture. The authors' list has as many; only a few of theirs are known
to us, so the list is ours and holds those."""

_NUMBERS = ("one", "two", "three")
_COLUMNS: Mapping[int, tuple[str, ...]] = {
    2: ("on the left side", "on the right side"),
    3: ("on the left side", "in the middle", "on the right side"),
}
_ROWS: Mapping[int, tuple[str, ...]] = {
    1: ("",), 2: ("above", "below"), 3: ("above", "in the middle", "below"),
}  # fmt: skip
_WORLD_CENTRE = "in the middle"


def segments(
    format: str, n_images: int, target: int, question: str, rng: random.Random, style: Style
) -> list[Segment]:
    """The prompt that asks a question about one of several pictures.

    Args:
        format: Sequence, grid or pic-in-pic.
        n_images: Number of source pictures.
        target: 1-based number of the picture that is meant; ``n_images + 1`` asks for one that is
            not there (a refusal), for a sequence or a grid.
        question: The question about one picture.
        rng: Chooses the phrase that names the centre of a picture within a picture.
        style: ``paper`` or ``world``.

    Returns:
        Text and image segments in order.

    Raises:
        ValueError: If the format is not defined for this number, or the style has no word for it.
    """
    check_number(format, n_images)
    if style == "world" and format == SEQUENCE and max(n_images, target) > len(_NUMBERS):
        raise ValueError(f"prompts in the world's words count to 3, got {max(n_images, target)}")
    asked = _joined(_name(format, n_images, target, rng, style), question, style)
    if format != SEQUENCE:
        return [_image(), _text(asked)]
    parts: list[Segment] = []
    for number in range(1, n_images + 1):
        parts += [_text(_heading(number, style)), _image()]
    return [*parts, _text(f"\n{asked}" if style == "paper" else asked)]


def centre_phrase(rng: random.Random) -> str:
    """One of the `CENTRE_PHRASES`."""
    return CENTRE_PHRASES[rng.randrange(len(CENTRE_PHRASES))]


def numbers(format: str, style: Style) -> tuple[int, ...]:
    """For how many pictures of a format a style has words."""
    if style == "world" and format == SEQUENCE:
        return tuple(n for n in ALLOWED[format] if n <= len(_NUMBERS))
    return ALLOWED[format]


def _heading(number: int, style: Style) -> str:
    if style == "world":
        return f"image {_NUMBERS[number - 1]} :"
    return f"Image{number}:" if number == 1 else f"\nImage{number}:"


def _name(format: str, n_images: int, target: int, rng: random.Random, style: Style) -> str:
    """Words that single the target out, without the comma that follows."""
    if style == "paper":
        return centre_phrase(rng) if format == PIP else f"In Image{target}"
    if format == PIP:
        return _WORLD_CENTRE
    if format == SEQUENCE:
        return f"in image {_NUMBERS[target - 1]}"
    if target > n_images:
        raise ValueError("the world's words have no name for a tile that is not there")
    return _position(n_images, target)


def _position(n_images: int, target: int) -> str:
    """Where a tile of a grid is, in the world's words."""
    rows, columns = SHAPES[n_images]
    row, column = divmod(target - 1, columns)
    words = [_ROWS[rows][row], _COLUMNS[columns][column]]
    return " ".join(dict.fromkeys(word for word in words if word))


def _joined(name: str, question: str, style: Style) -> str:
    lowered = question[:1].lower() + question[1:]
    return f"{name} , {lowered}" if style == "world" else f"{name}, {lowered}"


def _text(text: str) -> Segment:
    return {"type": "text", "text": text}


def _image() -> Segment:
    return {"type": "image"}
