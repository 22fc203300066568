"""Which image tokens show an object, and which tokens of another object take their places."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import Tensor

    from mmlm.token_places import Footprints

__all__ = ["COVERED", "nearest", "region"]

COVERED = 10 / 64
"""A token shows an object if the object's box covers at least this part of what it shows: 10 of the
64 pixels of a patch, the rule by which the embedded world labels its patches."""

Box = tuple[float, float, float, float]
"""x, y, width, height as parts of the picture's width and height."""


def region(seen: Footprints, box: Box) -> tuple[int, ...]:
    """The tokens of a picture that show a box, in the order of the prompt.

    Args:
        seen: What each token shows.
        box: The box.
    """
    x, y, width, height = box
    down = seen.down @ _covered(seen.shape[0], y, y + height)
    across = seen.across @ _covered(seen.shape[1], x, x + width)
    return tuple((down * across >= COVERED).nonzero()[:, 0].tolist())


def _covered(cells: int, start: float, end: float) -> Tensor:
    """Part of each of some equal cells that lies between two places in [0, 1]."""
    import torch

    edges = torch.arange(cells + 1) / cells
    return (edges[1:].clamp(max=end) - edges[:-1].clamp(min=start)).clamp(min=0) * cells


def nearest(seen: Footprints, old: Sequence[int], donor: Footprints, new: Sequence[int]) -> tuple:
    """For each token of a region the token of another one that stands at the same place in it.

    Regions are stretched over each other: nearest-neighbour resampling of one onto the bounding box
    of the other. Where a picture is seen several times, in whole and in tiles, tokens that show
    about as much of their picture are preferred.

    Args:
        seen: What the tokens of the picture show.
        old: The region that is replaced; not empty.
        donor: What the tokens of the other picture show.
        new: The region that takes its place; not empty.

    Returns:
        For each of ``old`` one of ``new``.
    """
    import torch

    here, size = _places(seen, old)
    there, other = _places(donor, new)
    apart = torch.cdist(_in_box(here), _in_box(there))
    apart = apart + 10 * ((size[:, None] / other[None]).log2().abs() > 1)
    return tuple(new[i] for i in apart.argmin(-1).tolist())


def _places(seen: Footprints, tokens: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Where tokens stand in their picture, down and across in [0, 1], and how much they show."""
    import torch

    index = torch.tensor(tokens)
    parts = (seen.down[index], seen.across[index])
    middle = [part @ ((torch.arange(part.shape[1]) + 0.5) / part.shape[1]) for part in parts]
    # A token that spreads over n cells of a line has n / cells of it: the inverse of its peak.
    size = torch.stack([1 / (part.amax(-1) * part.shape[1]) for part in parts]).prod(0)
    return torch.stack(middle, -1), size


def _in_box(places: Tensor) -> Tensor:
    """Places relative to the bounding box of all of them; 0.5 where it has no extent."""
    import torch

    low, high = places.amin(0), places.amax(0)
    extent = high - low
    return torch.where(extent > 1e-6, (places - low) / extent.clamp(min=1e-6), 0.5)
