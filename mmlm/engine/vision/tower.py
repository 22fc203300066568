"""Attention inside a vision tower, a few rows at a time and without asking the tower for it.

Towers run their own kernels, which return no weights. From a block's input the queries and keys are
cheap to compute again; the class token's row costs O(P), the attention that patches receive is
summed up in chunks of rows, so no P x P tensor of all heads is ever held.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.errors import UnsupportedModel

__all__ = [
    "ATTENTION_NAMES",
    "NORM_NAMES",
    "ROTARY_NAMES",
    "attention_received",
    "class_attention",
    "feature_block",
    "feature_blocks",
    "first_of",
    "tower_attention_missing",
    "tower_query_key",
]

NORM_NAMES = ("layer_norm1", "layernorm_before", "norm1")
ATTENTION_NAMES = ("self_attn", "attention", "attn")
#: Arguments by which a block gets rotary positions: its queries and keys are not projections alone.
ROTARY_NAMES = frozenset({"position_embeddings", "rotary_pos_emb"})
#: Most numbers in one chunk of weights.
_CHUNK = 1 << 22


def feature_block(anatomy: Anatomy) -> int:
    """The block whose output is the image features (the deepest of several).

    ``hidden_states[0]`` is what enters block 0, so ``vision_feature_layer = -2`` is the output of
    the last block but one. Towers without that entry give their last block's output.
    """
    return max(feature_blocks(anatomy))


def feature_blocks(anatomy: Anatomy) -> list[int]:
    """The blocks whose outputs make the image features, in the order of the configuration."""
    n = len(anatomy.tower_blocks)
    chosen = getattr(anatomy.config, "vision_feature_layer", -1)
    entries = [chosen] if isinstance(chosen, int) else list(chosen)
    return [max(e - 1 if e >= 0 else n + e, 0) for e in entries]


def tower_attention_missing(anatomy: Anatomy) -> str:
    """Why queries and keys of this tower's blocks cannot be computed; empty if they can."""
    try:
        block = anatomy.tower_blocks[0]
    except UnsupportedModel as error:
        return str(error)
    name = type(block).__name__
    if ROTARY_NAMES & set(inspect.signature(block.forward).parameters):
        return (
            f"blocks of the vision tower ({name}) rotate their queries and keys by position, and "
            "some attend within windows only"
        )
    if first_of(block, NORM_NAMES) is None:
        return f"blocks of the vision tower ({name}) have no {' or '.join(NORM_NAMES)}"
    attention = first_of(block, ATTENTION_NAMES)
    if getattr(attention, "q_proj", None) is None or getattr(attention, "k_proj", None) is None:
        return f"the attention of the vision tower's blocks ({name}) has no q_proj and k_proj"
    return ""


def tower_query_key(
    anatomy: Anatomy, block: int, x: Float[Tensor, "T S D"], queries: slice
) -> tuple[Float[Tensor, "T H R d"], Float[Tensor, "T H S d"]]:
    """Scaled queries of some rows and keys of all rows of a tower block.

    Args:
        anatomy: The model's parts.
        block: Number of the block.
        x: What enters the block; S is P patches, plus the class token in front if there is one.
        queries: The rows whose queries are wanted.

    Returns:
        Queries times ``d ** -0.5``, and keys: their product is the scores. fp32.

    Raises:
        UnsupportedModel: If the block's queries and keys are not plain projections of its input.
    """
    missing = tower_attention_missing(anatomy)
    if missing:
        raise UnsupportedModel(
            f"Attention in the vision tower cannot be computed here: {missing}.",
            advice="Use a model with a CLIP, SigLIP or InternViT tower.",
        )
    module = anatomy.tower_blocks[block]
    attention: Any = first_of(module, ATTENTION_NAMES)
    y = first_of(module, NORM_NAMES)(x)
    q, k = attention.q_proj(y[:, queries]), attention.k_proj(y)
    # Where these norms exist they run over all heads together, before the heads are split.
    q_norm, k_norm = getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)
    q = q if q_norm is None else q_norm(q)
    k = k if k_norm is None else k_norm(k)
    heads = attention.num_heads
    scale = (q.shape[-1] // heads) ** -0.5
    q = q.unflatten(-1, (heads, -1)).transpose(1, 2).float() * scale
    return q, k.unflatten(-1, (heads, -1)).transpose(1, 2).float()


def class_attention(
    anatomy: Anatomy, block: int, x: Float[Tensor, "T S D"]
) -> Float[Tensor, "T H P"]:
    """The class token's attention to the patches: one row of each head, O(P).

    Raises:
        UnsupportedModel: If the tower has no class token, or see :func:`tower_query_key`.
    """
    if not anatomy.tower_has_cls:
        raise UnsupportedModel(
            f"The vision tower of {anatomy.family_name} has no class token.",
            advice="Use a score that does not need one.",
        )
    q, k = tower_query_key(anatomy, block, x, slice(0, 1))
    weights = torch.matmul(q, k.transpose(-1, -2)).softmax(-1)  # [T, H, 1, P + 1]
    return weights[:, :, 0, 1:]


def attention_received(
    anatomy: Anatomy, block: int, x: Float[Tensor, "T S D"]
) -> Float[Tensor, "T H P"]:
    """The mean attention that each patch gets from all patches, in chunks of rows.

    A class token takes part in the softmax, but is neither counted as a query nor returned.
    """
    first = int(anatomy.tower_has_cls)
    q, k = tower_query_key(anatomy, block, x, slice(first, None))
    keys = k.transpose(-1, -2)
    tiles, heads, patches, _ = q.shape
    step = max(1, _CHUNK // (tiles * heads * k.shape[2]))
    received = q.new_zeros(tiles, heads, k.shape[2])
    for rows in q.split(step, dim=2):
        received = received + torch.matmul(rows, keys).softmax(-1).sum(2)
    return received[:, :, first:] / patches


def first_of(module: Any, names: tuple[str, ...]) -> Any:
    """The first attribute that exists."""
    return next((part for n in names if (part := getattr(module, n, None)) is not None), None)
