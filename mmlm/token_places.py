"""Which part of a picture each image token shows.

Processors resize, pad, crop and cut pictures in ways of their own. None of this is worked out again
here: drawings of the picture's size are sent through the very processor that prepares the picture,
and how bright a patch arrives tells which part of the drawing it shows. From patches to tokens it
goes through the model's own packing. A family whose way from patches to tokens is not known is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from mmlm.errors import UnsupportedModel

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmlm.engine.anatomy import Anatomy

__all__ = ["KNOWN", "Footprints", "brightness", "footprints"]

KNOWN = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "paligemma",
        "qwen2_5_vl",
        "qwen3_vl",
        "smolvlm",
    }
)
"""Model types whose way from patches to tokens is checked by a test."""

_MOST = 48
"""Cells along a side of a map: more are not told apart on a screen, and each costs a drawing."""
_SAME_LINE = 0.006
"""Parts of the picture's height below which two tokens stand in one line: above the rounding of
8-bit ramps, below the lines of a map of 64."""
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
    if key not in known:
        if len(known) >= _KEPT:
            known.clear()
        known[key] = processor, _measured(model, processor, size)
    return known[key][1]


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
    below = along[(across <= 0) & (along > _SAME_LINE)]
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


def brightness(model: Any, processor: Any, drawings: Sequence[Image.Image]) -> Tensor:
    """How bright each token of a picture is in each of some drawings of it.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor.
        drawings: Colour drawings of one size, that of the picture.

    Returns:
        fp32 [drawings, 3 colours, tokens]: 0 where black, 1 where white; sharp resampling may
        overshoot at borders. Padding counts as black, and so do tokens that show nothing (row
        ends). What the processor crops away is in no token.

    Raises:
        UnsupportedModel: For a family whose way from patches to tokens is not known.
    """
    import torch
    from PIL import Image

    from mmlm.engine.anatomy import Anatomy

    anatomy = Anatomy(model)
    if anatomy.family_name not in KNOWN:
        raise _unknown(anatomy, "its way from patches to tokens is not known")
    size = drawings[0].size
    black = _pixels(processor, Image.new("RGB", size))
    white = _pixels(processor, Image.new("RGB", size, (255,) * 3))
    reach = white["pixel_values"] - black["pixel_values"]
    # Padding is the same in all of them, and so becomes 0.
    reach = reach.where(reach != 0, torch.ones(()))
    patches = []
    for drawing in drawings:  # one by one: pixels of a large picture are many
        level = (_pixels(processor, drawing)["pixel_values"] - black["pixel_values"]) / reach
        patches.append(_to_patches(anatomy, level))
    tokens = int((torch.isin(black["input_ids"], torch.tensor(anatomy.image_ids))).sum())
    found = _to_tokens(anatomy, torch.cat(patches), black, tokens)
    return found.unflatten(0, (len(drawings), 3))


def _pixels(processor: Any, picture: Image.Image) -> dict[str, Tensor]:
    """What the processor makes of a drawing."""
    from mmlm.inputs import message, prepare

    return prepare(processor, [[message("user", "", 1)]], [[picture]])


def _to_patches(anatomy: Anatomy, level: Tensor) -> Tensor:
    """Means over the pixels of each patch, by colour: [3, patches] or [3, tiles, patches]."""
    from torch.nn import functional

    if level.ndim == 2:  # flattened patches, colour after colour
        return level.unflatten(-1, (3, -1)).mean(-1).T
    patch = anatomy.config.vision_config.patch_size
    side = patch if isinstance(patch, int) else patch[0]
    colours = level.flatten(0, -4).transpose(0, 1)  # [3, tiles, height, width]
    return functional.avg_pool2d(colours, side).flatten(2)


def _to_tokens(anatomy: Anatomy, parts: Tensor, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """Parts of patches as parts of tokens, in the order of the sequence."""
    if parts.ndim == 2:  # patches that become one token stand side by side
        merge = anatomy.config.vision_config.spatial_merge_size
        found = parts.view(len(parts), -1, merge * merge).mean(-1)
    elif anatomy.family.sizes == "packed":
        found = _packed(anatomy, parts, inputs)
    else:
        found = _merged(anatomy, parts, tokens)
    if found.shape[1] != tokens:
        raise _unknown(anatomy, f"{found.shape[1]} cells are expected for {tokens} image tokens")
    return found


def _packed(anatomy: Anatomy, parts: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Through the model's own packing of tiles: unpadded, resized, with row ends."""
    config = anatomy.config
    name = (
        "vision_aspect_ratio"
        if hasattr(config, "vision_aspect_ratio")
        else "vision_feature_select_strategy"
    )
    features, _ = anatomy.composite.pack_image_features(
        [parts.permute(1, 2, 0)],
        inputs["image_sizes"],
        image_newline=parts.new_zeros(len(parts)),
        **{name: getattr(config, name)},
    )
    packed: Tensor = features[0].T
    return packed


def _merged(anatomy: Anatomy, parts: Tensor, tokens: int) -> Tensor:
    """Square blocks of each tile's patches become one token."""
    from torch.nn import functional

    regions, tiles, patches = parts.shape
    side, short = math.isqrt(patches), math.isqrt(tokens // tiles)
    if side * side != patches or short * short * tiles != tokens or side % short:
        raise _unknown(anatomy, f"{tiles} x {patches} patches become {tokens} tokens")
    grid = parts.reshape(regions, tiles, side, side)
    return functional.avg_pool2d(grid, side // short).flatten(1)


def _unknown(anatomy: Anatomy, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"Which image token of {anatomy.family_name} shows which part of a picture is not known: "
        f"{reason}.",
        advice="Do without a map of the picture (how much attention an image gets in all needs "
        f"none), or choose a model of one of these types: {', '.join(sorted(KNOWN))}.",
    )
