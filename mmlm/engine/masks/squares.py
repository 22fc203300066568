"""What callers say about who may see whom: finished 4-D masks, and positions of packed rows."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, TypeGuard

import torch
from torch import Tensor
from transformers.masking_utils import find_packed_sequence_indices

from mmlm.engine.layout import TokenLayout
from mmlm.errors import LayoutError

__all__ = ["apart", "is_square", "refuse_numbers"]


def refuse_numbers(mask: Any) -> None:
    """Refuses a caller's 4-D mask that holds numbers.

    Integers raise in some kernels, and a float mask of ones and zeros would silently be added to
    the scores.

    Raises:
        LayoutError: If there is such a mask.
    """
    if isinstance(mask, Tensor) and mask.ndim == 4 and mask.dtype != torch.bool:
        raise LayoutError(
            f"The 4-D attention mask holds {mask.dtype}; beside a method that opens attention only "
            "True / False are allowed.",
            advice="Pass mask.bool() of a mask of ones and zeros, or the processor's 2-D one.",
        )


def is_square(mask: Any, ids: Tensor) -> TypeGuard[Tensor]:
    """Whether a caller gave the whole mask of a prompt, bool [B or 1, 1, N, N]."""
    n = ids.shape[1]
    return (
        isinstance(mask, Tensor)
        and mask.dtype == torch.bool
        and mask.ndim == 4
        and mask.shape[0] in (1, ids.shape[0])
        and tuple(mask.shape[1:]) == (1, n, n)
    )


def apart(layout: TokenLayout, inputs: dict[str, Any], config: Any) -> TokenLayout:
    """The layout with the documents of packed rows told apart, where the library does so.

    That is: position ids that start again, no attention mask and no cache.

    Args:
        layout: Read from ids: one document a row.
        inputs: Of the inner model.
        config: Of the text decoder.
    """
    places, caching = inputs.get("position_ids"), inputs.get("use_cache")
    if places is None or inputs.get("attention_mask") is not None:
        return layout
    if inputs.get("past_key_values") is not None:
        return layout
    if config.use_cache if caching is None else caching:
        return layout  # the decoder makes a cache, and then takes no row for a packed one
    if places.ndim == 3:  # the text's own axis, if there is one
        if places.shape[0] != 4:
            return layout
        places = places[0]
    documents = find_packed_sequence_indices(places.expand(layout.rows, -1))
    if documents is None:
        return layout
    documents = documents.to(layout.seg.device, layout.doc.dtype)
    return replace(layout, doc=torch.where(layout.real, documents, -1))
