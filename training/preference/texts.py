"""Preference rows as text: what the model reads, and what stands behind it for each answer.

The text is the one of generation (`mmlm.inputs.prepare` with ``begun=``): prompt, the template's
joiner, the context, one blank, the answer.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple, TypeAlias

from mmlm.answers import answer_frame, prompt_is_apart
from mmlm.errors import InputError
from mmlm.inputs import use_chat_template
from training.errors import PictureCountMismatch, UnusableResponse
from training.preference.rows import PreferenceRow, check_row

__all__ = ["EndToken", "PairText", "PairWriter"]

EndToken: TypeAlias = Literal["own", "never", "always"]
"""Where an end token is learned: behind answers that end the turn, nowhere, behind every answer."""


class PairText(NamedTuple):
    """A row as text.

    Attributes:
        prompt: What the processor is given; placeholders are not expanded.
        begun: What is tokenised in one piece with an answer: prompt and context, or in PaliGemma,
            whose prompts are texts of their own, the context.
        chosen: What follows: a blank if one belongs there, the answer, its end if it has one.
        rejected: Likewise.
    """

    prompt: str
    begun: str
    chosen: str
    rejected: str


class PairWriter:
    """Writes rows for one model.

    Args:
        processor: A Hugging Face processor with a chat template.
        end_token: See `EndToken`.

    Raises:
        InputError: If there is no chat template.
        ValueError: If `end_token` is none of the three.
    """

    def __init__(self, processor: Any, end_token: EndToken) -> None:
        if end_token not in ("own", "never", "always"):
            raise ValueError(f"end_token must be own, never or always, got {end_token!r}")
        use_chat_template(processor, "model")
        self._processor = processor
        self._image_token = getattr(processor, "image_token", None)
        self._end_token = end_token
        self._apart = prompt_is_apart(processor)

    def __call__(self, row: PreferenceRow) -> PairText:
        """A row as text.

        Raises:
            PictureCountMismatch: If the rendered prompt has more or fewer places for pictures.
            UnusableResponse: If an answer is empty or holds an image token.
            InputError: See `check_row`; or if PaliGemma is given a prompt without a picture, or an
                end token is wanted and there is none.
        """
        check_row(row)
        prompt, joiner, closing = answer_frame(self._processor, row.prompt)
        self._check(row, prompt)
        context = row.context.rstrip()
        begun, blank = (f"{joiner}{context}", " ") if context else ("", joiner)
        answers = [
            f"{blank}{answer.strip()}{self._end(row, ends, closing)}"
            for answer, ends in ((row.chosen, row.chosen_ends), (row.rejected, row.rejected_ends))
        ]
        if self._apart:
            return PairText(prompt, begun, *answers)
        return PairText(prompt + begun, prompt + begun, *answers)

    def _check(self, row: PreferenceRow, prompt: str) -> None:
        if self._apart and not row.images:
            raise InputError(
                f"row {row.id!r} has no picture, and PaliGemma's prompts must have one.",
                advice="Leave the row out, or use another model.",
            )
        token = self._image_token
        if not token:
            return
        if (found := prompt.count(token)) != len(row.images):
            raise PictureCountMismatch(
                f"row {row.id!r} has {len(row.images)} pictures, and its prompt {found} times "
                f"{token!r}.",
                advice="Take the image token out of the row's words, or check the chat template.",
            )
        for name in ("context", "chosen", "rejected"):
            if token in getattr(row, name):
                raise UnusableResponse(
                    f"row {row.id!r}: `{name}` holds {token!r}, which the model takes for a "
                    "picture.",
                    advice="Remove it.",
                )

    def _end(self, row: PreferenceRow, ends: bool, closing: str) -> str:
        wanted = ends if self._end_token == "own" else self._end_token == "always"
        if wanted and not closing:
            raise InputError(
                f"row {row.id!r}: no end token is known; the template writes none, and the "
                "tokenizer has none.",
                advice="Give end_token: never, or set the tokenizer's eos_token.",
            )
        return closing if wanted else ""
