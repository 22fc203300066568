"""Takes out of a prompt the blank text that a processor wrote around its images.

Gemma 3's processor puts a blank line before and after each image. In the token ids it is no part of
the image's frame: the tokenizer melts the line breaks into those of the text around, three breaks
being one token. A prompt without its images should have none of it, so such tokens are shortened.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mmlm.engine.layout import TokenLayout

__all__ = ["without_blanks"]

#: What becomes of positions: position -> the token there, or None if it goes.
_Changes = dict[int, int | None]


def without_blanks(
    ids: Tensor, layout: TokenLayout, blank: str, tokenizer: Any
) -> tuple[Tensor, Tensor]:
    """Shortens or drops the tokens that spell ``blank`` before and after each image.

    An image whose surroundings do not spell ``blank``, or where the rest of a token is no single
    token, is left as it is.

    Args:
        ids: int64 [B, N].
        layout: Roles of the positions.
        blank: The text around each image.
        tokenizer: A Hugging Face tokenizer.

    Returns:
        The ids with shortened tokens, and bool [B, N]: positions that hold blank text only.
    """
    new, gone = ids.clone(), torch.zeros_like(ids, dtype=torch.bool)
    spelled = _Speller(tokenizer)
    text = (layout.real & ~layout.visual & ~layout.frame).tolist()
    for b, (row, is_text) in enumerate(zip(ids.tolist(), text, strict=True)):
        for start, stop in _images(is_text, layout.real[b].tolist()):
            for position, step in ((start - 1, -1), (stop, 1)):
                for place, token in _strip(row, is_text, position, step, blank, spelled).items():
                    if token is None:
                        gone[b, place] = True
                        row[place] = -1
                    else:
                        new[b, place] = row[place] = token
    return new, gone


class _Speller:
    """Text of single tokens, and the single token of a text."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._texts: dict[int, str] = {-1: ""}

    def text(self, token: int) -> str:
        if token not in self._texts:
            self._texts[token] = self._tokenizer.decode([token])
        return self._texts[token]

    def token(self, text: str) -> int | None:
        tokens = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return tokens[0] if len(tokens) == 1 and self.text(tokens[0]) == text else None


def _images(is_text: list[bool], real: list[bool]) -> list[tuple[int, int]]:
    """Runs of image and frame positions, [start, stop) each."""
    inside = [r and not t for r, t in zip(real, is_text, strict=True)]
    starts = [i for i, x in enumerate(inside) if x and not (i and inside[i - 1])]
    stops = [i + 1 for i, x in enumerate(inside) if x and not inside[i + 1 : i + 2] == [True]]
    return list(zip(starts, stops, strict=True))


def _strip(
    row: list[int], is_text: list[bool], position: int, step: int, blank: str, spelled: _Speller
) -> _Changes:
    """Changes that take ``blank`` off the text that ends or begins at ``position``."""
    changes: _Changes = {}
    while blank and 0 <= position < len(row) and is_text[position]:
        text = spelled.text(row[position])
        whole, part = (
            (blank.endswith, text.endswith)
            if step < 0
            else (
                blank.startswith,
                text.startswith,
            )
        )
        if row[position] == -1:  # went with the image before
            pass
        elif text and whole(text):
            changes[position] = None
            blank = blank[: -len(text)] if step < 0 else blank[len(text) :]
        elif text and part(blank):
            rest = text[: -len(blank)] if step < 0 else text[len(blank) :]
            token = spelled.token(rest)
            return {} if token is None else {**changes, position: token}
        else:
            return {}
        position += step
    return {} if blank else changes
