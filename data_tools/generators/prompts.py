r"""What a model that goes on with a caption is given: the prompt, and behind it the caption so far.

The caption stands in an assistant's turn that is still open: no end token, nothing that closes the
turn. Text of prompt and caption is tokenised in one piece, so that the tokens are those that a
caption written in one go would have.

Two blanks need a rule. Between the template's text and the caption stands what the template itself
writes there (`joiner`): " " behind ``ASSISTANT:``, nothing behind ``assistant\n``. Behind the
caption stands nothing: the next sentence begins with the model's own blank, which in a byte-level
or SentencePiece vocabulary is a part of its first token, and in a vocabulary of words is not there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmlm.answers import answer_joiner, prompt_is_apart
from mmlm.inputs import message, prepare, render

if TYPE_CHECKING:
    import torch
    from PIL import Image

__all__ = ["CaptionPrompts", "Stem"]


@dataclass(frozen=True)
class Stem:
    """The part of a prompt's tokens that no caption changes.

    Attributes:
        ids: Token ids, pictures included.
    """

    ids: tuple[int, ...]


class CaptionPrompts:
    """Writes prompts for one processor.

    Args:
        processor: A Hugging Face processor with a chat template.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        self._tokenizer = processor.tokenizer
        self._added = frozenset(self._tokenizer.added_tokens_decoder)
        self._joiners: dict[str, str] = {}
        # Its prompts and answers are two texts to its tokenizer and its attention.
        self._in_two = prompt_is_apart(processor)

    def joiner(self, question: str) -> str:
        """What stands between the prompt and the answer; see `mmlm.answers.answer_frame`."""
        if question not in self._joiners:
            asked = [message("user", question, 1)]
            self._joiners[question] = answer_joiner(self._processor, asked)
        return self._joiners[question]

    def inputs(
        self,
        image: Image.Image,
        question: str,
        context: str,
        device: str | torch.device = "cpu",
        dtype: torch.dtype | None = None,
    ) -> dict[str, torch.Tensor]:
        """Model inputs of a fresh prompt, one row.

        Args:
            image: The picture.
            question: The question.
            context: The caption so far; "" at its beginning.
            device: Where the tensors go.
            dtype: Number format of the pixels.

        Raises:
            ValueError, ZeroDivisionError: If the processor refuses the picture.
            InputError: If the template refuses the question.
        """
        asked = [message("user", question, 1)]
        start = self.joiner(question) + context if context else ""
        if self._in_two or not start:
            made = prepare(self._processor, [asked], [[image]], device, dtype)
            return self._with_answer(made, start) if start else made
        return prepare(self._processor, [asked], [[image]], device, dtype, begun=[start])

    def _with_answer(self, made: dict[str, torch.Tensor], start: str) -> dict[str, torch.Tensor]:
        """PaliGemma: behind the prompt, which sees itself whole, the answer sees backwards only."""
        import torch

        ids = made["input_ids"].new_tensor([self._answer_ids(start)])
        more = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        more["token_type_ids"] = torch.ones_like(ids)
        return made | {name: torch.cat([made[name], new], dim=1) for name, new in more.items()}

    def n_fixed(self, inputs: dict[str, torch.Tensor], image_ids: torch.Tensor) -> int:
        """How many tokens of a fresh prompt, from the first on, cannot be read without the others.

        Args:
            inputs: What `inputs` made.
            image_ids: Placeholders of pictures.
        """
        import torch

        if self._in_two:  # the prompt attends to itself in both directions
            return int((inputs["token_type_ids"] == 0).sum())
        where = torch.isin(inputs["input_ids"][0], image_ids).nonzero()
        return int(where.max()) + 1 if len(where) else 0

    def _answer_ids(self, start: str) -> list[int]:
        ids: list[int] = self._tokenizer(start, add_special_tokens=False)["input_ids"]
        return ids

    # ---- token ids without the picture -----------------------------------------------------------

    def stem(self, ids: Sequence[int], question: str, context: str) -> Stem | None:
        """What stays of a fresh prompt's ids for every other caption of its picture.

        A tokenizer cuts a text at its added tokens (picture placeholders, turn marks) before
        anything else, so what follows the last of them is tokenised by itself, wherever the
        processor has put how many placeholders before it.

        Args:
            ids: What `inputs` made.
            question: Of it.
            context: Of it.

        Returns:
            None if the processor writes text of its own between the picture and the question, with
            no added token behind it; then every caption needs the processor.
        """
        tail = self._tail(question, context)
        if tail is None:
            return None
        cut = len(ids) - len(tail)
        alone = self._in_two or (cut > 0 and ids[cut - 1] in self._added)
        if not alone or tuple(ids[cut:]) != tuple(tail):
            return None
        return Stem(tuple(ids[:cut]))

    def ids(self, stem: Stem, question: str, context: str) -> tuple[int, ...] | None:
        """Token ids of a fresh prompt with another caption, without its picture.

        Returns:
            None if the caption holds the text of an added token; then the processor must decide.
        """
        tail = self._tail(question, context)
        return None if tail is None else (*stem.ids, *tail)

    def _tail(self, question: str, context: str) -> list[int] | None:
        start = self.joiner(question) + context if context else ""
        if self._in_two:
            return self._answer_ids(start) if start else []
        text = render(self._processor, [message("user", question, 1)])
        whole = self._answer_ids(text + start)
        before = self._answer_ids(text) if start else whole
        last = _last(whole, self._added)
        return whole[last + 1 :] if last == _last(before, self._added) else None


def _last(ids: Sequence[int], wanted: frozenset[int]) -> int:
    """Index of the last of some tokens; -1 if there is none."""
    return next((i for i in range(len(ids) - 1, -1, -1) if ids[i] in wanted), -1)
