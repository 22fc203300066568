"""Pictures of training rows: their sizes before training, their pixels in it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmlm.errors import ImageReadError
from mmlm.inputs import load_image

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["picture_size", "read_pictures"]

_ORIENTATION = 0x0112
_TURNED = (5, 6, 7, 8)


def read_pictures(sources: Sequence[Any], name: str) -> list[Image.Image]:
    """The pictures of a row, decoded completely.

    Args:
        sources: Paths, bytes, pictures, or what `datasets` stores: ``{"bytes", "path"}``.
        name: What messages call the row.

    Raises:
        ImageReadError: If one cannot be read; names the row and the file.
    """
    try:
        return [load_image(_source(one)) for one in sources]
    except ImageReadError as error:
        raise ImageReadError(f"{name}: {error}", advice=error.advice) from error


def picture_size(source: Any, *, decode: bool = False) -> tuple[int, int]:
    """Width and height of a picture as `read_pictures` will give it.

    Args:
        source: See `read_pictures`.
        decode: Decode all of it, so that a damaged or cut off file is found too; otherwise only
            the head of the file is read.

    Raises:
        ImageReadError: If it cannot be read.
    """
    from PIL import Image

    if not decode and isinstance(source, str):
        # Whatever a decoder raises, and it raises many things: load_image says why.
        with contextlib.suppress(Exception), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata; load_image has its own limits
            with Image.open(source) as image:
                width, height = image.size
                # The base class's: PNG's own would decode the picture to look behind it.
                turned = Image.Image.getexif(image).get(_ORIENTATION) in _TURNED
            return (height, width) if turned else (width, height)
    return load_image(_source(source)).size


def _source(one: Any) -> Any:
    if isinstance(one, Mapping):
        return one["path"] if one.get("bytes") is None else one["bytes"]
    return one
