"""The mask that a text decoder would use by itself, written out by the library's own functions."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from mmlm.engine.masks.flex import asking
from mmlm.engine.masks.kinds import BLOCKS, FULL, SLIDING, kind_of_mask, kinds
from mmlm.engine.removal.columns import typed_mask
from mmlm.errors import LayoutError

__all__ = ["written_out"]

_BUILDERS = {FULL: create_causal_mask, SLIDING: create_sliding_window_causal_mask}


def written_out(config: Any, kwargs: dict[str, Any]) -> Any:
    """The decoder's own mask as 4-D tensors: one, or one per kind of layer if there are several.

    For flex kernels they are masks of blocks, or the rules of such masks.

    Args:
        config: The decoder's configuration.
        kwargs: The arguments that it is called with.
    """
    given = kwargs.get("attention_mask")
    if isinstance(given, dict):
        return {kind: _base(config, kind, mask, kwargs) for kind, mask in given.items()}
    masks = {kind: _base(config, kind, given, kwargs) for kind in kinds(config)}
    return masks if len(masks) > 1 else next(iter(masks.values()))


def _base(config: Any, kind: str, mask: Any, kwargs: dict[str, Any]) -> Any:
    """The mask that the decoder would use itself, written out: [rows or 1, 1, L, K]."""
    embeds, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
    how = kind_of_mask(config)
    if how == BLOCKS:
        if mask is not None and not isinstance(mask, Tensor):
            return mask  # the inner model made it
        config = asking(config)
    if not (isinstance(mask, Tensor) and mask.ndim == 4):
        places = kwargs.get("position_ids")
        if places is not None and places.ndim == 3:  # the text's own axis, if there is one
            places = places[0] if places.shape[0] == 4 else None
        caching = kwargs.get("use_cache")
        if cache is None and (config.use_cache if caching is None else caching):
            places = None  # the decoder makes a cache, and then takes no row for a packed one
        mask = _BUILDERS[kind](
            config=config,
            inputs_embeds=embeds,
            attention_mask=mask,
            past_key_values=cache,
            position_ids=places,
        )
    if how == BLOCKS:
        return mask
    if mask is None:  # the library leaves out a mask that is causal and nothing else
        new = embeds.shape[1]
        ones = torch.ones(1, 1, new, new, dtype=torch.bool, device=embeds.device)
        return typed_mask(ones.tril(), config._attn_implementation or "eager", embeds.dtype)
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise LayoutError(
            f"The 4-D attention mask holds {mask.dtype}; True / False or additive numbers are "
            "allowed.",
            advice="Pass the processor's 2-D attention_mask.",
        )
    return mask
