"""Which image of a prompt each position belongs to: the slots that DARA's factors are chosen by."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mmlm.engine.anatomy import unwrap
from mmlm.engine.layout import TokenLayout
from mmlm.errors import LayoutError

__all__ = ["explicit_slots", "given_slots", "image_slots", "place_images"]

#: Where a model keeps slots that its user gave.
_SLOTS = "_mmlm_dara_slots"


def place_images(
    count: int, images: int, align: str = "error", overflow: str = "error"
) -> tuple[int, ...] | None:
    """Slots of the images of one prompt, in their order: demonstrations first, the query last.

    Args:
        count: Images of the prompt, >= 1.
        images: Slots S there are; the last one is the query's.
        align: What fewer images than S are: an "error", or ("query_last") the first
            demonstrations and the query.
        overflow: What more images are: an "error", or ("last_demo") further demonstrations in the
            slot of the last one.

    Returns:
        ``count`` slots, None if that is an error.
    """
    if count == images:
        return tuple(range(images))
    if count < images:
        return None if align == "error" else (*range(count - 1), images - 1)
    if overflow == "error":
        return None
    return (*(min(n, images - 2) for n in range(count - 1)), images - 1)


def image_slots(
    layout: TokenLayout, images: int, align: str = "error", overflow: str = "error"
) -> Int[Tensor, "B N"]:
    """The slot of the image that each position belongs to, -1 for what is no image feature.

    Tiles of one image are one image; images are counted anew in every document of a packed row.

    Raises:
        LayoutError: If a prompt has other than S images and no rule says where they go.
    """
    img, doc, visual = layout.img.cpu(), layout.doc.cpu(), layout.visual.cpu()
    slots = torch.full(img.shape, -1, dtype=torch.long)
    for row in range(layout.rows):
        for document in doc[row][visual[row]].unique():
            here = visual[row] & (doc[row] == document)
            numbers, ordinal = img[row][here].unique(return_inverse=True)
            placed = place_images(len(numbers), images, align, overflow)
            if placed is None:
                where = f" (document {int(document)})" if int(document) else ""
                raise LayoutError(
                    f"DARA: row {row}{where} has {len(numbers)} images, and there are factors for "
                    f"S = {images}.",
                    advice=(
                        "Give overflow='last_demo' (further demonstrations share the last one's "
                        "factor), or images=S of your prompts."
                        if len(numbers) > images
                        else "Give align='query_last' (the last image is the query's, the others "
                        "are demonstrations from the first on), or images=S of your prompts."
                    ),
                )
            slots[row][here] = torch.tensor(placed)[ordinal]
    return slots.to(layout.img.device)


@contextmanager
def explicit_slots(model: nn.Module, slots: Int[Tensor, "B N"]) -> Iterator[None]:
    """Says for one block which slot each position belongs to, instead of counting images.

    For prompts whose query or demonstrations have several images each. It works around a block of
    ``attach`` as around a model that DARA is built into.

    Args:
        model: As for :func:`mmlm.attach`.
        slots: For every position of the caller's rows (beams are multiplied later): 0 .. S - 1 at
            image features, -1 elsewhere.

    Raises:
        ValueError: When the prompt begins, if the shape is not the prompt's, a slot lies outside
            -1 .. S - 1, or one stands where no image feature is.
    """
    inner: Any = unwrap(model)
    setattr(inner, _SLOTS, slots)
    try:
        yield
    finally:
        delattr(inner, _SLOTS)


def given_slots(model: Any, layout: TokenLayout, images: int) -> Tensor | None:
    """Slots that a user gave, checked, for the rows of the prompt; None if there are none.

    Raises:
        ValueError: See :func:`explicit_slots`.
    """
    slots = getattr(model, _SLOTS, None)
    if slots is None:
        return None
    rows, n = layout.rows, layout.length
    whole = slots.dtype in (torch.int8, torch.int16, torch.int32, torch.int64)
    fits = whole and slots.ndim == 2 and slots.shape[1] == n and rows % slots.shape[0] == 0
    if not fits:
        raise ValueError(
            f"DARA: slots must be integers of the prompt's shape [{rows}, {n}] (or of its rows "
            f"before they were multiplied), got {slots.dtype} {list(slots.shape)}."
        )
    slots = slots.to(layout.img.device).long().repeat_interleave(rows // slots.shape[0], dim=0)
    low, high = int(slots.min()), int(slots.max())
    if low < -1 or high >= images:
        raise ValueError(
            f"DARA: slots must be from -1 (no image) to {images - 1} (S = {images}), got "
            f"{low if low < -1 else high}."
        )
    stray = (slots >= 0) & ~layout.visual
    if bool(stray.any()):
        row, column = stray.nonzero()[0].tolist()
        raise ValueError(
            f"DARA: row {row} has slot {int(slots[row, column])} at position {column}, which is no "
            "image feature; text has -1."
        )
    return slots
