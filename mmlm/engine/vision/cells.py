"""Grids of image states cut into cells: which cell a column lies in, and which column is central.

Pure functions of integers and tensors; :mod:`mmlm.engine.vision.pooling` uses them to put one
feature per cell at the place of the cell's centre.
"""

from __future__ import annotations

import functools

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["cell_of", "central", "closeness", "spread"]


def cell_of(size: int, cells: int, device: torch.device | None = None) -> Int[Tensor, "size"]:
    """The cell, of ``cells`` equal ones, in which each of ``size`` columns has its middle."""
    index = torch.arange(size, device=device)
    return (2 * index + 1) * cells // (2 * size)


@functools.lru_cache(maxsize=64)
def central(
    grid: tuple[int, int], cells: tuple[int, int], device: torch.device | None = None
) -> Bool[Tensor, "h w"]:
    """The columns of a grid that are nearest to the centre of their cell, one for each cell.

    Of several that are equally near it is the upper left one.
    """
    rows, columns = (_central_line(size, n, device) for size, n in zip(grid, cells, strict=True))
    return rows[:, None] & columns


def closeness(
    grid: tuple[int, int], cells: tuple[int, int], device: torch.device | None = None
) -> Float[Tensor, "n c"]:
    """How near each column is to the centre of each cell: 0 outside it, in (0, 1] inside.

    The column of :func:`central` has the largest value of its cell.
    """
    (height, width), (down, across) = grid, cells
    y, x = cell_of(height, down, device), cell_of(width, across, device)
    dy, dx = _off_centre(height, down, device), _off_centre(width, across, device)
    distance = dy[:, None].square() + dx.square()
    # Equally near ones: the first in reading order.
    order = torch.arange(height * width, device=device).view(height, width)
    near = 1 / (1 + distance) - 1e-6 * order / (height * width)
    own = (y[:, None] * across + x).flatten()
    marks = near.new_zeros(height * width, down * across)
    return marks.scatter(1, own[:, None], near.flatten()[:, None])


def spread(pooled: Float[Tensor, "T a b D"], grid: tuple[int, int]) -> Float[Tensor, "T h w D"]:
    """Each column of a grid with the state of its cell."""
    rows = cell_of(grid[0], pooled.shape[1], pooled.device)
    columns = cell_of(grid[1], pooled.shape[2], pooled.device)
    return pooled[:, rows][:, :, columns]


def _off_centre(size: int, cells: int, device: torch.device | None) -> Float[Tensor, "size"]:
    """Distance of each column's middle from its cell's centre, in columns."""
    index = torch.arange(size, device=device)
    middle = (2 * cell_of(size, cells, device) + 1) * (size / (2 * cells))
    return (index + 0.5 - middle).float()


def _central_line(size: int, cells: int, device: torch.device | None) -> Bool[Tensor, "size"]:
    off, own = _off_centre(size, cells, device).abs(), cell_of(size, cells, device)
    best = off.new_full((cells,), float("inf")).scatter_reduce(0, own, off, "amin")
    nearest = off <= best[own] + 1e-4
    # Of two equally near ones, the first.
    index = torch.arange(size, device=device)
    first = index.new_full((cells,), size).scatter_reduce(
        0, own, torch.where(nearest, index, size), "amin"
    )
    return index == first[own]
