"""Factors of image heads, memory heads and the others of their layers; published lists of both."""

from __future__ import annotations

from collections.abc import Collection
from typing import Literal, TypeAlias

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlm.engine.head_maps import Head
from mmlm.engine.selections import HeadSet

__all__ = ["PUBLISHED", "Kind", "head_weights", "pairs", "weigh"]

Kind: TypeAlias = Literal["image", "memory", "other"]

#: Image heads and memory heads from the authors' results, as layer.head.
PUBLISHED = {
    "llava-next-mistral-7b": (
        "31.18 31.22 31.25 31.27 30.9 30.29 29.2 29.12 29.14 28.13 28.15 25.9 24.11 24.21 21.7 "
        "20.14 20.17 19.8 19.9 18.12",
        "31.20 31.26 30.10 30.28 29.0 29.13 29.15 28.0 28.14 25.11 22.29 21.6 21.21 20.20 20.22 "
        "19.10 19.19 17.19 16.2 3.18",
    ),
}


def pairs(heads: HeadSet | None) -> list[Head]:
    """The heads of a parameter as (layer, head) pairs."""
    return [(layer, head) for layer, own in heads or () for head in own]


def head_weights(
    n_heads: int,
    image_heads: Collection[Head],
    memory_heads: Collection[Head],
    image_change: float,
    memory_change: float,
    *,
    rebalanced: bool = True,
) -> dict[Head, tuple[float, Kind]]:
    """Factors of all heads of the layers that have a listed one, and on what they act.

    Image heads get ``1 + image_change`` (on the image), memory heads ``1 + memory_change`` (on the
    text). With ``rebalanced`` the others share what is left (on the text), so that the factors of a
    layer sum to the number of its heads: ``(H - N (1 + gamma) - F (1 + lambda)) / M`` for N image,
    F memory and M other heads.
    """
    result: dict[Head, tuple[float, Kind]] = {}
    for layer in sorted({layer for layer, _ in (*image_heads, *memory_heads)}):
        image = {head for at, head in image_heads if at == layer}
        memory = {head for at, head in memory_heads if at == layer}
        n_others = n_heads - len(image) - len(memory)
        left = n_heads - len(image) * (1 + image_change) - len(memory) * (1 + memory_change)
        other = left / n_others if rebalanced and n_others else 1.0
        for head in range(n_heads):
            if head in image:
                result[layer, head] = (1 + image_change, "image")
            elif head in memory:
                result[layer, head] = (1 + memory_change, "memory")
            else:
                result[layer, head] = (other, "other")
    return result


def weigh(
    a: Float[Tensor, "B H R K"],
    visual: Bool[Tensor, "B K"],
    on_image: Float[Tensor, "H"],
    on_text: Float[Tensor, "H"],
) -> Float[Tensor, "B H R K"]:
    """Attention weights times one factor per head on image keys and one on all others.

    Rows do not sum to 1 any more, and negative factors are allowed, as in the authors' code.
    """
    factors = torch.where(visual[:, None, None], on_image[:, None, None], on_text[:, None, None])
    return a * factors.to(a.dtype)
