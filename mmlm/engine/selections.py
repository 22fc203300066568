"""Layers, dimensions and heads that a user chose, as a method's parameter."""

from __future__ import annotations

import operator
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy

__all__ = [
    "HeadSet",
    "by_layer",
    "check_heads",
    "check_layers",
    "check_shape",
    "read_heads",
    "read_numbers",
]

#: ``((layer, (head, ...)), ...)``: sorted, every layer and every head of a layer once.
HeadSet: TypeAlias = tuple[tuple[int, tuple[int, ...]], ...]


class _OfFile(tuple[tuple[int, tuple[int, ...]], ...]):
    """Heads of a file; equal to the same heads written out.

    Attributes:
        file: Where they were read.
        shape: Layers and heads of the model that the file is for.
    """

    file: str
    shape: tuple[int, int]


def read_numbers(owner: str, name: str, values: Any) -> tuple[int, ...]:
    """Numbers of layers or dimensions, one or several, sorted and checked.

    Args:
        owner: Name of the method, for the error.
        name: Name of the parameter, for the error.
        values: What the user gave; a single number stands for itself.

    Raises:
        ValueError: If there are none, or one is no integer >= 0 or stands there twice.
    """
    read = tuple(values) if isinstance(values, Iterable) else (values,)
    if not read or not all(isinstance(v, int) and not isinstance(v, bool) for v in read):
        raise ValueError(f"{owner}: {name} must be a non-empty list of integers, got {values!r}.")
    if len(set(read)) != len(read) or min(read) < 0:
        raise ValueError(f"{owner}: {name} must be different and >= 0, got {values!r}.")
    return tuple(sorted(read))


def check_layers(owner: str, layers: Iterable[int], n_layers: int) -> None:
    """Makes sure that a model of ``n_layers`` layers has these layers.

    Raises:
        ValueError: If it does not.
    """
    for layer in layers:
        if not 0 <= layer < n_layers:
            raise ValueError(
                f"{owner}: layer {layer} does not exist; the model has layers 0 to {n_layers - 1}."
            )


def read_heads(owner: str, name: str, heads: Any) -> HeadSet:
    """Heads in any of the forms in which they can be given, sorted and checked.

    Args:
        owner: Name of the method, for the error.
        name: Name of the parameter, for the error.
        heads: What the user gave: ``((layer, (head, ...)), ...)``, a mapping, ``((layer, head),
            ...)``, or the path of a map of heads (``mmlm calibrate heads --kind visual``), of which
            the heads above its threshold are taken. Lists are as good as tuples.

    Raises:
        ValueError: If it has another form, is empty, or names something twice; if there is no such
            file, or no head in it.
    """
    if isinstance(heads, _OfFile):
        return heads
    if isinstance(heads, str | Path) and Path(heads).suffix == ".json":
        return _heads_of_file(owner, str(heads))
    form = f"{owner}: {name} must be ((layer, (head, ...)), ...), got {heads!r}."
    if not isinstance(heads, Iterable) or isinstance(heads, str):
        raise ValueError(form)
    try:
        pairs = tuple(heads.items() if isinstance(heads, Mapping) else heads)
        if pairs and not any(isinstance(of, Iterable) for _, of in pairs):
            pairs = by_layer(pairs)
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


def by_layer(heads: Collection[tuple[int, int]]) -> HeadSet:
    """(layer, head) pairs as ``((layer, (head, ...)), ...)``, sorted."""
    layers = sorted({layer for layer, _ in heads})
    return tuple((n, tuple(sorted(head for layer, head in heads if layer == n))) for n in layers)


def _heads_of_file(owner: str, file: str) -> _OfFile:
    """The heads of a map, with the shape of its model."""
    from mmlm.engine.head_maps import HeadMap

    try:
        found = HeadMap.load(file)
    except ValueError as error:
        raise ValueError(f"{owner}: {error}.") from error
    if not found.heads:
        raise ValueError(f"{owner}: {file!r}: no head is above the threshold {found.threshold}.")
    heads = _OfFile(by_layer(found.heads))
    heads.file, heads.shape = file, found.shape
    return heads


def check_shape(owner: str, file: str, shape: tuple[int, int], anatomy: Anatomy) -> None:
    """Makes sure that a file of heads is for a model of this shape.

    Args:
        owner: Name of the method, for the error.
        file: The file.
        shape: Layers and heads of the model that it is for.
        anatomy: The model.

    Raises:
        ValueError: If it is not.
    """
    own = (anatomy.n_layers, anatomy.n_heads)
    if shape != own:
        raise ValueError(
            f"{owner}: {file!r} is for {shape[0]} layers of {shape[1]} heads; the model has "
            f"{own[0]} of {own[1]}."
        )


def check_heads(owner: str, heads: HeadSet, anatomy: Anatomy) -> None:
    """Makes sure that a model has these layers and heads.

    Raises:
        ValueError: If it does not, or if they are those of a file for a model of another shape.
    """
    if isinstance(heads, _OfFile):
        check_shape(owner, heads.file, heads.shape, anatomy)
    check_layers(owner, (layer for layer, _ in heads), anatomy.n_layers)
    for layer, chosen in heads:
        if chosen[-1] >= anatomy.n_heads:
            raise ValueError(
                f"{owner}: layer {layer} has heads 0 to {anatomy.n_heads - 1}, got {chosen[-1]}."
            )
