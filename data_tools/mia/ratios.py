"""The share of every source picture in the attention that a response paid to the pictures.

Of a sequence every picture has tokens of its own. Of a collage and of a picture within a picture
the tokens of one composed picture are divided by its tiles (`data_tools.mia.regions`).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from data_tools.mia.attention import shares
from data_tools.mia.layouts import SHAPES
from data_tools.mia.prompting import Prompted
from data_tools.mia.records import PIP, SEQUENCE
from data_tools.mia.regions import central_square, equal_blocks, region_sums, tile_shares
from mmlm.errors import UnsupportedModel

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Regions"]

_REMEMBERED = 256
"""Maps of so many sizes of pictures are kept; all collages of one shape have the same."""


class Regions:
    """Divides measured attention among source pictures, for one model.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._parts = functools.lru_cache(_REMEMBERED)(
            functools.partial(tile_shares, model, processor)
        )

    def ratios(
        self, prompt: Prompted, measured: Mapping[str, Any], *, parity: bool = False
    ) -> list[float] | None:
        """The share of every source picture, in their order.

        Args:
            prompt: The prompt.
            measured: A record of `mmlm.ImageAttention`; with ``maps`` for composed pictures.
            parity: The authors' rules: means over keys instead of sums, the token grid in equal
                blocks, the centre as 16 x 16 of 24 x 24 tokens.

        Returns:
            Shares that sum to 1; of a picture within a picture first that of the outer one, without
            the inner. None if there is no attention on any of them.

        Raises:
            UnsupportedModel: If the tokens of a composed picture cannot be told apart.
        """
        record, images = prompt.record, measured["images"]
        if len(images) != len(prompt.pictures):
            raise UnsupportedModel(
                f"{len(prompt.pictures)} pictures reach the model as {len(images)} images.",
                advice="Switch off what makes several of one in the processor (pan and scan).",
            )
        if record["format"] == SEQUENCE:
            return shares(images, measured["keys"] if parity else None)
        return shares(self._blocks(prompt, measured) if parity else self._tiles(prompt, measured))

    def has_parity(self, measured: Mapping[str, Any]) -> bool:
        """Whether the authors' rules, made for 24 x 24 tokens, mean anything for these images."""
        return all(math.isqrt(n) ** 2 == n and n >= 16 * 16 for n in measured["keys"])

    def _tiles(self, prompt: Prompted, measured: Mapping[str, Any]) -> list[float]:
        tiles = tuple(tuple(tile) for tile in prompt.record["tiles"])
        parts = self._parts(prompt.pictures[0].size, tiles)
        sums = region_sums(_map(measured), parts[1:])
        if prompt.record["format"] == PIP:
            whole, inner = sums
            return [max(whole - inner, 0.0), inner]
        return sums

    def _blocks(self, prompt: Prompted, measured: Mapping[str, Any]) -> list[float]:
        attention = _map(measured)
        side = math.isqrt(len(attention))
        if side * side != len(attention):
            raise UnsupportedModel(
                f"The authors' blocks need a square grid of tokens, not {len(attention)} tokens.",
                advice="Score without --parity.",
            )
        grid = attention.view(side, side)
        if prompt.record["format"] == PIP:
            inner = central_square(grid)
            return [float(grid.sum()) - inner, inner]
        return equal_blocks(grid, *SHAPES[prompt.record["n_images"]])


def _map(measured: Mapping[str, Any]) -> Tensor:
    import torch

    return torch.tensor(measured["maps"][0], dtype=torch.float64)
