"""Several conversations in one row, each of which sees itself only.

Rows of a batch are as long as the longest one; conversations of 200 tokens beside one of 2,000 are
mostly padding. Packed, they share a row: the loss and its gradients are those of separate rows.

The mask is transformers' own. Without a 2-D mask and a cache, the library finds the documents of a
row by their positions, which start again at each one, and builds the mask of whatever attention is
in use: sdpa, eager, flash (variable-length kernels) and flex, sliding windows included. A default
cache would switch that off without a word, so packed batches say ``use_cache=False`` themselves.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, UnsupportedModel
from training.sft.documents import IGNORED, Document, padded

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

__all__ = ["FAMILIES", "check_packing", "pack", "packed_batch", "rope_index"]

FAMILIES = (
    *("llava", "llava_next", "llava_onevision", "qwen2_5_vl", "qwen3_vl"),
    *("internvl", "idefics3", "smolvlm"),
)
"""Model types whose packed loss and gradients were compared with separate rows (tests)."""

WRONG = {
    "paligemma": "its prefix is read both ways, as one block for the whole row",
    "gemma3": "its sliding layers look up what is a picture by the place in the document and not "
    "in the row (transformers 5.23, create_masks_for_vision_model)",
}
"""Families for which packing is known to be wrong, and why."""

DECODERS = ("llama", "mistral", "qwen2", "qwen2_5_vl_text", "qwen3", "qwen3_vl_text")
"""Text models with attention layers alone, which take positions and masks from outside."""

_FLASH_ROWS = 1
_ONE_DOCUMENT = frozenset({"attended", "patches", "pool", "tokens", "visual_tokens"})


def check_packing(model: PreTrainedModel, rows_per_pass: int) -> None:
    """Refuses models and settings under which documents of a row would see each other.

    Args:
        model: The model to be trained.
        rows_per_pass: Packed rows of one forward pass.

    Raises:
        UnsupportedModel: If the family was not compared with separate rows.
        InputError: With flash attention and more than one row: its kernels find the documents in
            the positions of a single row only. With built-in methods that take positions out of
            the rows, or look from text at pictures: they do not know the documents of a row.
    """
    from mmlm.engine.build_in import built_in

    for method in built_in(model):
        found = sorted(method.sites & _ONE_DOCUMENT)
        if found:
            raise InputError(
                f"{method.label} acts at {', '.join(found)} and takes a row for one document.",
                advice="Train with packing: false (group_by_length saves most of the padding too).",
            )
    family, text = model.config.model_type, model.config.get_text_config()
    if family in WRONG:
        raise UnsupportedModel(
            f"Packed rows would be wrong for {family!r}: {WRONG[family]}.",
            advice="Train with packing: false (group_by_length saves most of the padding too).",
        )
    if family not in FAMILIES or text.model_type not in DECODERS:
        raise UnsupportedModel(
            f"Packing is not known to be right for {family!r} with the decoder "
            f"{text.model_type!r}; it is for {', '.join(FAMILIES)} with {', '.join(DECODERS)}.",
            advice="Train with packing: false (group_by_length saves most of the padding too).",
        )
    implementation = text._attn_implementation or ""
    if implementation not in ("sdpa", "eager", "flex_attention") and "flash" not in implementation:
        raise UnsupportedModel(
            f"The attention {implementation!r} is not known to keep packed documents apart.",
            advice="Use attention: sdpa, or packing: false.",
        )
    if "flash" in implementation and rows_per_pass > _FLASH_ROWS:
        raise InputError(
            f"With {implementation} packed rows go one at a time; rows_per_pass is "
            f"{rows_per_pass}.",
            advice="Set rows_per_pass: 1 and a larger max_length: one long row is the same work.",
        )


def rope_index(model: PreTrainedModel) -> Callable[..., Any] | None:
    """The family's rule for 3-D positions (Qwen), None where positions are a plain count.

    It is bound to a module of the model's class without any weights, so that a data worker can
    have it.
    """
    from torch import nn

    kind = type(model.base_model)
    if "get_rope_index" not in dir(kind):
        return None
    shell = kind.__new__(kind)
    nn.Module.__init__(shell)
    shell.config = model.config
    return shell.get_rope_index


def pack(lengths: Sequence[int], capacity: int, seed: int) -> list[tuple[int, ...]]:
    """Puts documents into rows: longest first, each into the fullest row that still has room.

    Best-fit decreasing (Ding et al., arXiv 2404.10830, section 3) never cuts a document.

    Args:
        lengths: Tokens of every document.
        capacity: Tokens of a row; no document is longer.
        seed: Which of equally long documents meet in a row.

    Returns:
        The documents of every row.

    Raises:
        ValueError: If a document is longer than a row.
    """
    if lengths and max(lengths) > capacity:
        raise ValueError(f"a document of {max(lengths)} tokens, rows of {capacity}")
    order = list(range(len(lengths)))
    random.Random(seed).shuffle(order)
    order.sort(key=lambda n: -lengths[n])
    rows: list[list[int]] = []
    rooms: list[int] = []  # in use, ascending
    waiting: dict[int, list[int]] = {}  # rows by the room that is left in them
    for document in order:
        place = bisect.bisect_left(rooms, lengths[document])
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = waiting[room].pop()
            if not waiting[room]:
                del waiting[room], rooms[place]
        rows[row].append(document)
        left = room - lengths[document]
        if left and left not in waiting:
            bisect.insort(rooms, left)
        if left:
            waiting.setdefault(left, []).append(row)
    return [tuple(row) for row in rows]


def packed_batch(
    rows: Sequence[Sequence[Document]],
    pixels: dict[str, Tensor],
    *,
    pad_token_id: int,
    multiple: int,
    rope: Callable[..., Any] | None,
) -> dict[str, Any]:
    """Lays documents behind one another: ids, labels, types [B, L], positions [B, L] or [4, B, L].

    Padding at a row's end is a document of its own, without labels. Of 3-D positions the first is
    the plain count, from which the mask is made.

    Args:
        rows: The documents of each row.
        pixels: All pictures' tensors, in the documents' order.
        pad_token_id: For padding.
        multiple: The length is a multiple of it.
        rope: See `rope_index`.
    """
    import torch

    documents = [document for row in rows for document in row]
    counted = _positions(documents, pixels, rope)  # per document [P, n]
    batch: dict[str, Any] = padded(
        [_joined(row) for row in rows], pad_token_id=pad_token_id, multiple=multiple
    )
    length = batch["input_ids"].shape[1]
    laid, first = [], 0
    for row in rows:
        own = counted[first : first + len(row)]
        first += len(row)
        rest = length - sum(one.shape[1] for one in own)
        laid.append(torch.cat([*own, torch.arange(rest).expand(own[0].shape[0], -1)], dim=1))
    positions = torch.stack(laid, dim=1)  # [P, B, L]
    del batch["attention_mask"]
    return {
        **batch,
        **pixels,
        "position_ids": positions[0] if rope is None else positions,
        "use_cache": False,
    }


def _joined(documents: Sequence[Document]) -> Document:
    import torch

    names = {name for document in documents for name in document.types}
    return Document(
        torch.cat([document.ids for document in documents]),
        torch.cat([_no_first(document.labels) for document in documents]),
        sum(document.n_images for document in documents),
        {
            name: torch.cat([document.types.get(name, document.ids * 0) for document in documents])
            for name in sorted(names)
        },
    )


def _no_first(labels: Tensor) -> Tensor:
    """The first token of a document would be predicted from the document before it."""
    labels = labels.clone()
    labels[0] = IGNORED
    return labels


def _positions(
    documents: Sequence[Document], pixels: dict[str, Tensor], rope: Callable[..., Any] | None
) -> list[Tensor]:
    """Positions of each document by itself: [1, n], or [4, n] with a rule for 3-D positions."""
    import torch

    plain = [torch.arange(len(document.ids))[None] for document in documents]
    if rope is None:
        return plain
    grid, first, positions = pixels.get("image_grid_thw"), 0, []
    for document, count in zip(documents, plain, strict=True):
        if not document.n_images:
            positions.append(count.expand(4, -1))
            continue
        own = grid[first : first + document.n_images]  # type: ignore[index]
        first += document.n_images
        spatial, _ = rope(
            input_ids=document.ids[None],
            mm_token_type_ids=document.types["mm_token_type_ids"][None],
            image_grid_thw=own,
            attention_mask=torch.ones_like(document.ids)[None],
        )
        positions.append(torch.cat([count, spatial[:, 0]]))
    return positions
