"""Kinds of decoder layers, by what they may see, and what each attention kernel can be told.

A text decoder has one mask per kind of layer: without bound, or through a sliding window.
"""

from __future__ import annotations

from typing import Any

__all__ = [
    "BLOCKS",
    "DENSE",
    "FULL",
    "SLIDING",
    "SPLIT",
    "first_layer",
    "kind_of_layer",
    "kind_of_mask",
    "kinds",
    "reasons_against_dense_masks",
    "reasons_against_masks",
    "reasons_against_removal",
    "window",
]

FULL, SLIDING = "full_attention", "sliding_attention"

#: How an attention kernel is told who sees whom: a finished 4-D mask; a mask of blocks (flex); or
#: not at all (flash), so that what is opened must be computed beside it.
DENSE, BLOCKS, SPLIT = "dense", "blocks", "split"


def kinds(config: Any) -> list[str]:
    """Kinds of layers of a text decoder, each with a mask of its own."""
    types = getattr(config, "layer_types", None)
    if types:
        return sorted(set(types))
    return [SLIDING if getattr(config, "sliding_window", None) else FULL]


def kind_of_layer(config: Any, layer: int) -> str:
    """The kind of one layer."""
    types = getattr(config, "layer_types", None)
    return str(types[layer]) if types else kinds(config)[0]


def first_layer(config: Any, kind: str) -> int:
    """The first layer of a kind, which stands for all of them in a cache."""
    return next((i for i in range(config.num_hidden_layers) if kind_of_layer(config, i) == kind), 0)


def window(config: Any, kind: str) -> int | None:
    """How many positions, its own included, a query of a kind of layer sees; None: all."""
    return int(config.sliding_window) if kind == SLIDING else None


def kind_of_mask(config: Any) -> str:
    """How the attention of a text decoder, as it is set now, is told who sees whom."""
    implementation = config._attn_implementation or "eager"
    if "flash" in implementation:
        return SPLIT
    return BLOCKS if "flex" in implementation else DENSE


def reasons_against_masks(config: Any) -> list[str]:
    """Why a text decoder, as it is set now, can be opened by no method; empty if it can."""
    reasons = _unknown_kinds(config)
    if not getattr(config, "is_causal", True):
        reasons.append("its text decoder is not causal, so there is nothing to open")
    return reasons


def reasons_against_dense_masks(config: Any) -> list[str]:
    """Why a text decoder, as it is set now, takes no finished 4-D mask; empty if it does."""
    reasons = reasons_against_masks(config)
    if kind_of_mask(config) != DENSE:
        reasons.append(
            f"attention {config._attn_implementation!r} takes no 4-D mask and would silently stay "
            "causal (use sdpa or eager)"
        )
    return reasons


def reasons_against_removal(config: Any) -> list[str]:
    """Why positions cannot leave between the layers of a text decoder; empty if they can."""
    reasons = _unknown_kinds(config)
    implementation = config._attn_implementation or "eager"
    if "flex" in implementation:
        reasons.append(f"attention {implementation!r} has block masks (use sdpa or eager)")
    if "flash" in implementation and SLIDING in kinds(config):
        reasons.append(
            f"attention {implementation!r} counts a sliding window in columns, which are no longer "
            "positions once some are removed (use sdpa or eager)"
        )
    return reasons


def _unknown_kinds(config: Any) -> list[str]:
    unknown = [kind for kind in kinds(config) if kind not in (FULL, SLIDING)]
    return [f"it is not known how masks of {', '.join(unknown)} layers are made"] if unknown else []
