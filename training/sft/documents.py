"""Conversations as tensors, and rows of a batch made of them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["IGNORED", "TOKEN_TYPES", "Document", "padded"]

IGNORED = -100
"""Label of a token that is not learned."""

TOKEN_TYPES = ("mm_token_type_ids", "token_type_ids")
"""What processors say about every token: which belong to pictures, which to PaliGemma's prefix."""


@dataclass(frozen=True)
class Document:
    """One conversation, ready for a model.

    Attributes:
        ids: Token ids [n].
        labels: The ids of the tokens to be learned, `IGNORED` elsewhere [n].
        n_images: Number of its pictures.
        types: The processor's token types by name, each [n].
    """

    ids: Tensor
    labels: Tensor
    n_images: int
    types: dict[str, Tensor] = field(default_factory=dict)


def padded(
    documents: Sequence[Document], *, pad_token_id: int, multiple: int = 1
) -> dict[str, Tensor]:
    """Documents as rows of one length, padded on the right [B, L].

    Args:
        documents: One per row.
        pad_token_id: Fills the ids; labels get `IGNORED`, the mask and token types 0.
        multiple: L is a multiple of it.
    """
    import torch

    longest = max(len(document.ids) for document in documents)
    length = -(-longest // multiple) * multiple

    def rows(tensors: Sequence[Tensor], filling: int) -> Tensor:
        whole = torch.full((len(tensors), length), filling, dtype=torch.long)
        for row, tensor in enumerate(tensors):
            whole[row, : len(tensor)] = tensor
        return whole

    names = {name for document in documents for name in document.types}
    return {
        "input_ids": rows([document.ids for document in documents], pad_token_id),
        "labels": rows([document.labels for document in documents], IGNORED),
        "attention_mask": rows([torch.ones_like(document.ids) for document in documents], 0),
        **{
            name: rows([document.types.get(name, document.ids * 0) for document in documents], 0)
            for name in sorted(names)
        },
    }
