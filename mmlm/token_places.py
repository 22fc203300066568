"""Which part of a picture each image token shows.

Drawings of the picture's size, a few white bands each, become tokens as the picture does
(:mod:`mmlm.token_brightness`); how bright a token is tells which part of the drawing it shows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from mmlm.token_brightness import brightness

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

__all__ = ["Footprints", "footprints"]

_MOST = 48
"""Cells along a side of a map: more are not told apart on a screen, and each costs a drawing."""
_SAME_LINE = 0.006
"""Parts of the picture's height below which two tokens stand in one line: above the rounding of
8-bit ramps, below the lines of a map of 64."""
_TINY = 0.001
"""Parts of a side below which two tokens are not apart."""
_LEAST = 0.01
"""Part of a token below which it does not show something."""
_KEPT = 64
#: By model, then by processor (held, so that its identity stays its own) and size.
_cache: WeakKeyDictionary[Any, dict[Any, tuple[Any, Footprints]]] = WeakKeyDictionary()


@dataclass(frozen=True, eq=False)
class Footprints:
    """What each token of one picture shows of it, on a grid of ``rows`` x ``columns`` cells.

    Resampling acts on lines and columns apart, so the part of a token in a cell is a product.

    Attributes:
        down: fp32 [tokens, rows]; how a token divides over the rows. A token that shows nothing
            (row ends, padding) has zeros, every other one sums to 1.
        across: The same over the columns, fp32 [tokens, columns].
    """

    down: Tensor
    across: Tensor

    @property
    def tokens(self) -> int:
        """Number of tokens of the picture."""
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.down.shape[1], self.across.shape[1]

    def spread(self, values: Tensor) -> Tensor:
        """Values [..., tokens] as sums over the cells [..., rows, columns].

        What lies on tokens that show nothing is left out; of all others nothing is lost.
        """
        cells = self.down[:, :, None] * self.across[:, None, :]
        return (values.float() @ cells.flatten(1)).unflatten(-1, self.shape)


def footprints(model: Any, processor: Any, size: tuple[int, int]) -> Footprints:
    """Where the tokens of a picture of some size lie in it; remembered by model and size.

    The grid is as fine as the picture's finest tokens, at most 48 cells along a side. Where a model
    sees a picture several times (an overview and tiles), all its tokens are on the one grid.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor.
        size: Width and height of the picture, in pixels.

    Raises:
        UnsupportedModel: For a family whose way from patches to tokens is not known.
    """
    known = _cache.setdefault(model, {})
    key = (id(processor), size)
    remembered = known.get(key)
    if remembered is None:
        if len(known) >= _KEPT:
            known.clear()
        remembered = known[key] = processor, _measured(model, processor, size)
    return remembered[1]


def _measured(model: Any, processor: Any, size: tuple[int, int]) -> Footprints:
    ramps = brightness(model, processor, [_ramps(size)])[0]
    seen = ramps[0] > 0.5
    right, down = (ramps[i] / ramps[0].clamp(min=_LEAST) for i in (1, 2))
    beside, below = _steps(right[seen], down[seen])
    rows, columns = _Combs.over(below), _Combs.over(beside)
    parts = brightness(model, processor, _drawings(size, rows, columns)).flatten(0, 1).clamp(0, 1)
    seen_down = rows.bands(parts[: rows.period], down)
    seen_across = columns.bands(parts[rows.period : rows.period + columns.period], right)
    there = (seen_down.sum(-1, keepdim=True) > _LEAST) & (
        seen_across.sum(-1, keepdim=True) > _LEAST
    )
    return Footprints(_shares(seen_down, there), _shares(seen_across, there))


def _shares(seen: Tensor, there: Tensor) -> Tensor:
    """How each token divides over bands: sums of 1, or 0 where it shows nothing."""
    import torch

    # Sharp resampling rings beside a border: that is no part of the token.
    clear = torch.where(seen < _LEAST * seen.sum(-1, keepdim=True), 0, seen)
    return (there * clear / clear.sum(-1, keepdim=True).clamp(min=1e-6)).contiguous()


def _ramps(size: tuple[int, int]) -> Image.Image:
    """White in red; in green how far right a pixel is, in blue how far down."""
    import numpy as np
    from PIL import Image

    width, height = size
    canvas = np.full((height, width, 3), 255, np.uint8)
    canvas[..., 1] = np.round(255 * (np.arange(width) + 0.5) / width)[None]
    canvas[..., 2] = np.round(255 * (np.arange(height) + 0.5) / height)[:, None]
    return Image.fromarray(canvas)


def _steps(right: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """Steps between tokens that follow each other, within a line and from line to line.

    Args:
        right: [tokens]; how far right the centre of each token is, in parts of the width.
        down: How far down, in parts of the height.
    """
    across, along = right.diff(), down.diff()
    beside = across[(across > 0) & (along.abs() < _SAME_LINE)]
    below = along[(across < _TINY) & (along > _TINY)]
    return beside, below


@dataclass(frozen=True)
class _Combs:
    """Bands over one side of a picture, drawn several at a time.

    Bands that no token can see together are drawn in one colour, and told apart again by the
    token's place: a comb is every ``period``-th band.

    Attributes:
        cells: Number of bands.
        period: Number of combs.
    """

    cells: int
    period: int

    @classmethod
    def over(cls, steps: Tensor) -> _Combs:
        """Bands as fine as the finest tokens, combs that the coarsest see one band of.

        Args:
            steps: Steps between neighbours of all tokens; none where they are one in a line.
        """
        if not len(steps):
            return cls(1, 1)
        # The finest, not the most frequent: an overview has about as many lines as its tiles.
        finest = steps[steps < 1.25 * steps.quantile(0.25)].mean()
        cells = min(max(round(1 / float(finest)), 1), _MOST)
        # A token reaches into bands beside it; three combs are one drawing.
        covered = math.ceil(float(steps.max()) * cells) + 2
        return cls(cells, min(3 * math.ceil(covered / 3), cells))

    def drawn(self, pixels: int) -> Any:
        """Brightness of each pixel of the side in each comb: float [period, pixels].

        Borders of bands lie between pixels, as borders of tokens do; a pixel on one is grey.
        """
        parts = _parts(pixels, self.cells)
        return [parts[i :: self.period].sum(0) for i in range(self.period)]

    def bands(self, seen: Tensor, centre: Tensor) -> Tensor:
        """What each token sees of each band, [tokens, cells].

        Args:
            seen: [period, tokens]; what it sees of each comb.
            centre: [tokens]; where it is, in parts of the side.
        """
        import torch

        comb = torch.arange(self.period)[:, None]
        turn = ((centre * self.cells - 0.5 - comb) / self.period).round().long()
        band = comb + self.period * turn
        inside = (band >= 0) & (band < self.cells)
        found = seen.new_zeros(self.cells, seen.shape[1])
        found.scatter_add_(0, band.clamp(0, self.cells - 1), torch.where(inside, seen, 0))
        return found.T


def _drawings(size: tuple[int, int], rows: _Combs, columns: _Combs) -> list[Image.Image]:
    """Drawings of one comb per colour: first those of the rows, then those of the columns."""
    import numpy as np
    from PIL import Image

    width, height = size
    combs = [comb[:, None] for comb in rows.drawn(height)]
    combs += [comb[None] for comb in columns.drawn(width)]
    drawings = []
    for start in range(0, len(combs), 3):
        canvas = np.zeros((height, width, 3), np.uint8)
        for colour, comb in enumerate(combs[start : start + 3]):
            canvas[..., colour] = np.round(255 * comb)
        drawings.append(Image.fromarray(canvas))
    return drawings


def _parts(pixels: int, cells: int) -> Any:
    """Part of each pixel in each of some equal cells: float [cells, pixels]."""
    import numpy as np

    edges = np.arange(cells + 1)[:, None] * (pixels / cells)
    at = np.arange(pixels)[None]
    return np.clip(np.minimum(edges[1:], at + 1) - np.maximum(edges[:-1], at), 0, 1)
