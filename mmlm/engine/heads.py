"""Sets of attention heads by layer, as a method's parameter."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy

__all__ = ["HeadSet", "check_heads", "read_heads"]

#: ``((layer, (head, ...)), ...)``: sorted, every layer and every head of a layer once.
HeadSet: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]


def read_heads(owner: str, name: str, heads: Any) -> HeadSet:
    """Heads given as ``((layer, (head, ...)), ...)`` or as a mapping, sorted and checked.

    Args:
        owner: Name of the method, for the error.
        name: Name of the parameter, for the error.
        heads: What the user gave; lists are as good as tuples.

    Raises:
        ValueError: If it has another form, is empty, or names something twice.
    """
    form = f"{owner}: {name} must be ((layer, (head, ...)), ...), got {heads!r}."
    if not isinstance(heads, Iterable) or isinstance(heads, str):
        raise ValueError(form)
    try:
        pairs = heads.items() if isinstance(heads, Mapping) else heads
        read = tuple(
            sorted((operator.index(k), tuple(sorted(map(operator.index, v)))) for k, v in pairs)
        )
    except (TypeError, ValueError) as error:
        raise ValueError(form) from error
    if not read or any(layer < 0 or not chosen or chosen[0] < 0 for layer, chosen in read):
        raise ValueError(f"{owner}: layers and heads must be >= 0 and not empty, got {heads!r}.")
    layers = [layer for layer, _ in read]
    if len(set(layers)) != len(layers) or any(len(set(h)) != len(h) for _, h in read):
        raise ValueError(f"{owner}: {name} must name every layer and head once, got {heads!r}.")
    return read


def check_heads(owner: str, heads: HeadSet, anatomy: Anatomy) -> None:
    """Makes sure that a model has these layers and heads.

    Raises:
        ValueError: If it does not.
    """
    for layer, chosen in heads:
        if layer >= anatomy.n_layers:
            raise ValueError(
                f"{owner}: layer {layer} does not exist; the model has layers 0 to "
                f"{anatomy.n_layers - 1}."
            )
        if chosen[-1] >= anatomy.n_heads:
            raise ValueError(
                f"{owner}: layer {layer} has heads 0 to {anatomy.n_heads - 1}, got {chosen[-1]}."
            )
