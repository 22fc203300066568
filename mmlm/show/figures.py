"""Figures of what a model did: matplotlib, light background, colours that everybody tells apart.

Maps are drawn in viridis, whose brightness alone carries the order, over a grey picture, so that
no colour of the picture is taken for attention. Every function gets plain numbers and returns a
picture or a figure; nothing here runs a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmlm.errors import InputError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image

__all__ = ["MAP", "overlay"]

MAP = "viridis"
"""Colour map of everything that is more or less attention."""
_SIDE = 480
"""Pixels of the longer side of a map over a picture; small pictures are enlarged to it."""


def overlay(
    picture: Image.Image, values: np.ndarray, *, peak: float | None = None, side: int = _SIDE
) -> Image.Image:
    """Attention over a picture: the picture in dim grey, yellow where the model looked most.

    Each cell stays a cell: a smooth map would show more than was measured.

    Args:
        picture: The picture.
        values: [rows, columns], >= 0: :meth:`mmlm.show.looking.Look.of_span`.
        peak: The value of the brightest colour. None: the largest of ``values``. Give the same
            number to maps that are to be compared.
        side: Pixels of the longer side of the result, >= 1.

    Returns:
        RGB.

    Raises:
        InputError: If the map is not two-dimensional, or holds numbers below 0 or none at all.
    """
    import numpy as np
    from matplotlib import colormaps
    from PIL import Image

    values = np.asarray(values, np.float32)
    if values.ndim != 2 or not values.size or not (values >= 0).all():
        raise InputError(
            f"A map of shape {values.shape} cannot be laid over a picture.",
            advice="Give [rows, columns] of numbers from 0 on, such as Look.of_span returns.",
        )
    top = float(values.max()) if peak is None else peak
    level = np.clip(values / top, 0, 1) if top > 0 else np.zeros_like(values)
    scale = side / max(picture.size)
    size = (max(round(picture.width * scale), 1), max(round(picture.height * scale), 1))
    grey = np.asarray(picture.convert("L").resize(size, Image.Resampling.BICUBIC), np.float32)
    grey = np.repeat((0.1 + 0.65 * grey / 255)[..., None], 3, -1)
    cells = _enlarged(level, size)
    cover = 0.85 * cells[..., None]
    shown = grey * (1 - cover) + colormaps[MAP](cells)[..., :3] * cover
    return Image.fromarray(np.round(255 * shown).clip(0, 255).astype(np.uint8))


def _enlarged(values: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A map of cells as pixels [height, width], each pixel that of the cell it lies in."""
    import numpy as np

    width, height = size
    down = np.arange(height) * values.shape[0] // height
    across = np.arange(width) * values.shape[1] // width
    return values[down][:, across]
