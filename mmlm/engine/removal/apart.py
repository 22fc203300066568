"""Rows that lost positions run apart: a layer's pass over a batch as two passes over parts of it.

Where some rows of a batch lost positions and others did not, the shorter rows are padded to the
length of the longest one, which computes as much as if nothing had left. Here a layer of a prompt's
first pass runs once over the rows that lost something, cut to the length of the longest of *them*,
and once over the others. Keys and values of both parts are laid into the cache as if the layer had
run once, with nothing in the columns that nobody sees, so every later pass is the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn

if TYPE_CHECKING:
    from mmlm.engine.removal.pruning import Pruning

__all__ = ["Group", "groups", "install_apart"]


@dataclass(frozen=True, eq=False)
class Group:
    """Rows that run together.

    Attributes:
        rows: int64 [b]; their numbers.
        length: columns, from the right, that hold all they consist of.
    """

    rows: Int[Tensor, "b"]
    length: int

    def columns(self, x: Tensor, dim: int) -> Tensor:
        """The group's part of ``x``, whose dimension ``dim`` are columns and the first rows."""
        return x[self.rows].narrow(dim, x.shape[dim] - self.length, self.length)


def groups(
    valid: Bool[Tensor, "B n"], lost: Bool[Tensor, "B"], least: int
) -> tuple[Group, Group] | None:
    """The two parts of a batch, or None if it runs as one.

    Args:
        valid: columns of each row that hold something, on the right.
        lost: rows that lost positions.
        least: how many rows must have lost something.

    Returns:
        The shorter rows, then the others. Rows that never were longer than the shorter ones, such
        as those without an image, run with them.
    """
    if int(lost.sum()) < least:
        return None
    lengths = valid.sum(1)
    short = lengths <= int(torch.where(lost, lengths, 0).max())
    if bool(short.all()):
        return None
    parts = [part.nonzero()[:, 0] for part in (short, ~short)]
    first, second = (Group(rows, int(lengths[rows].max())) for rows in parts)
    return first, second


def install_apart(pruning: Pruning, layer: int, block: nn.Module, stack: ExitStack) -> None:
    """Has a layer run once per group of rows, if there are two.

    The layer's ``forward`` itself is replaced: hooks around it see the whole batch.

    Args:
        pruning: Knows the groups.
        layer: Its number.
        block: The layer.
        stack: Takes everything back on exit.
    """
    original = block.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        parts = pruning.groups(layer)
        if pruning.session.quiet or pruning.session.past or parts is None:
            return original(*args, **kwargs)
        return _run(original, parts, layer, args, kwargs)

    before = vars(block).get("forward")
    block.forward = forward
    stack.callback(_restore, block, before)


def _restore(block: nn.Module, before: Any) -> None:
    if before is None:
        del block.forward
    else:
        block.forward = before


def _run(
    original: Callable[..., Any],
    parts: tuple[Group, Group],
    layer: int,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
) -> Any:
    from transformers import DynamicCache

    x = args[0] if args else kwargs["hidden_states"]
    cache = kwargs.get("past_key_values")
    whole, keys, values = x.clone(), None, None
    for group in parts:
        own = _arguments(group, kwargs, x)
        if cache is not None:
            own["past_key_values"] = DynamicCache()
        if args:
            output = original(group.columns(x, 1), *args[1:], **own)
        else:
            output = original(**{**own, "hidden_states": group.columns(x, 1)})
        rest = output[1:] if isinstance(output, tuple) else ()
        whole[group.rows, -group.length :] = output[0] if isinstance(output, tuple) else output
        if cache is not None:
            filled = own["past_key_values"].layers[layer]
            keys = _laid(keys, filled.keys, group, x.shape)
            values = _laid(values, filled.values, group, x.shape)
    if cache is not None:
        cache.update(keys, values, layer)
    return (whole, *rest) if isinstance(output, tuple) else whole


def _arguments(group: Group, kwargs: dict[str, Any], x: Tensor) -> dict[str, Any]:
    """The group's part of a layer's arguments, in which every row of the batch has its own."""
    own = dict(kwargs)
    pair = kwargs.get("position_embeddings")
    if pair is not None:
        own["position_embeddings"] = tuple(group.columns(part, 1) for part in pair)
    places = kwargs.get("position_ids")
    if places is not None:
        last = places.ndim - 1
        picked = places.index_select(last - 1, group.rows)
        own["position_ids"] = picked.narrow(last, x.shape[1] - group.length, group.length)
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2:
        own["attention_mask"] = group.columns(mask, 1)
    elif mask is not None:
        # A query's row is cut like a key's column; columns beyond the prompt are a static cache's.
        mask = mask[group.rows, ..., : x.shape[1]]
        own["attention_mask"] = mask[..., -group.length :, -group.length :]
    return own


def _laid(whole: Tensor | None, part: Tensor, group: Group, shape: torch.Size) -> Tensor:
    """Keys or values [b, H, n, d] of a group at their place among those of all rows."""
    if whole is None:
        whole = part.new_zeros(shape[0], part.shape[1], shape[1], part.shape[3])
    whole[group.rows, :, -group.length :] = part
    return whole
