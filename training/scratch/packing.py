"""Several texts behind one shared image: rows, labels, positions and the block mask.

A row is `prefix | text 1 | text 2 | ...`. Every text attends to the prefix and to itself, and its
positions restart after the prefix, so the row computes exactly what the texts would give in rows
of their own, while the image is encoded, and read by the language model, only once. Texts of a
batch are padded on the right inside their segment: nothing real comes after them there, so a
causal mask hides the padding and one mask serves all rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from training.scratch.source import Round

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

__all__ = ["IGNORED", "Text", "block_mask", "encode", "pad", "positions"]

IGNORED = -100
"""Label of a position that carries no loss."""


@dataclass(frozen=True)
class Text:
    """One conversation after the image: token ids, and labels that are `IGNORED` in questions."""

    ids: list[int]
    labels: list[int]


def encode(
    tokenizer: PreTrainedTokenizerFast, rounds: Sequence[Round], max_tokens: int
) -> list[Text]:
    """Turns conversations into token ids: `Q assistant : A <eos> user : Q assistant : A <eos>`.

    This is what the chat template writes after `<bos> user : <image>`; labels stand on answers and
    their `<eos>` only. A conversation ends before the first turn that would not fit whole.

    Args:
        tokenizer: adds nothing of its own to a text.
        rounds: conversations, at least one turn each.
        max_tokens: longest text.

    Raises:
        ValueError: not even the first turn of a conversation fits.
    """
    pieces = [piece for turns in rounds for q, a in turns for piece in (q, a)]
    encoded = iter(tokenizer(pieces, add_special_tokens=False)["input_ids"])
    user, assistant = tokenizer(["user :", "assistant :"], add_special_tokens=False)["input_ids"]
    texts = []
    for turns in rounds:
        ids: list[int] = []
        labels: list[int] = []
        full = False
        for place, turn in enumerate(turns):
            question = [*(user if place else ()), *next(encoded), *assistant]
            answer = [*next(encoded), tokenizer.eos_token_id]
            full = full or len(ids) + len(question) + len(answer) > max_tokens
            if full and not place:
                raise ValueError(
                    f"{turn!r} takes {len(question) + len(answer)} tokens, max_tokens is "
                    f"{max_tokens}: raise it, or shorten the text"
                )
            if not full:
                ids += question + answer
                labels += [IGNORED] * len(question) + answer
        texts.append(Text(ids, labels))
    return texts


def pad(texts: Sequence[Text], pad_token_id: int) -> tuple[Tensor, Tensor]:
    """Ids and labels of a batch, [B, T] each, padded on the right to the longest text."""
    length = max(len(text.ids) for text in texts)
    ids = [text.ids + [pad_token_id] * (length - len(text.ids)) for text in texts]
    labels = [text.labels + [IGNORED] * (length - len(text.labels)) for text in texts]
    return torch.tensor(ids), torch.tensor(labels)


def positions(segments: Sequence[int]) -> Tensor:
    """Positions [1, L] of a row with the given segment lengths, the first one the prefix."""
    prefix, *texts = segments
    return torch.cat([torch.arange(prefix), *(prefix + torch.arange(n) for n in texts)])[None]


def block_mask(segments: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Additive mask [1, 1, L, L]: causal within each segment, and every text sees the prefix."""
    segment = torch.repeat_interleave(torch.arange(len(segments)), torch.tensor(segments))
    order = torch.arange(len(segment))
    causal = order[:, None] >= order[None, :]
    allowed = causal & ((segment[:, None] == segment[None, :]) | (segment[None, :] == 0))
    mask = torch.zeros(allowed.shape, dtype=dtype).masked_fill(~allowed, float("-inf"))
    return mask[None, None]
