"""Pictures read safely: whatever a file holds, a decoded RGB picture or one clear error."""

from __future__ import annotations

import io
import os
import struct
import warnings
import zlib
from pathlib import Path
from typing import BinaryIO, TypeAlias

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from mmlm.errors import ImageReadError

__all__ = ["MAX_PIXELS", "ImageSource", "load_image"]

ImageSource: TypeAlias = str | os.PathLike[str] | bytes | Image.Image

MAX_PIXELS = 89_478_485
"""Largest picture that is decoded (pixels); Pillow's own limit: a quarter of a GiB as RGB."""


# What Pillow's decoders raise on damaged files. UnidentifiedImageError is an OSError.
_DECODE_ERRORS = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    TypeError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def load_image(source: ImageSource, max_pixels: int = MAX_PIXELS) -> Image.Image:
    """Reads one picture safely.

    The header is checked before any pixel is decoded, so a decompression bomb costs nothing.
    Greyscale, palette, CMYK and 16-bit pictures are converted; transparent ones are laid on white;
    EXIF rotation is applied; of an animation the first frame is taken.

    Args:
        source: A path, the bytes of a file, or a picture.
        max_pixels: Larger pictures (width x height) are refused.

    Returns:
        An RGB picture, fully decoded.

    Raises:
        ImageReadError: If the picture is missing, empty, damaged, too large, or no picture; names
            the file and the reason.
    """
    name = _name(source)
    if isinstance(source, Image.Image):
        return _decode(source, name, max_pixels)
    # Pillow warns above half of its own limit and about odd metadata; _decode applies our limit.
    with _open(source, name) as stream, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = Image.open(stream)
        except UnidentifiedImageError:
            raise _unreadable(name, "it is no picture in a known format") from None
        except Image.DecompressionBombError as error:
            raise _unreadable(name, f"it is too large ({error})") from error
        except _DECODE_ERRORS as error:
            raise _unreadable(name, f"it is damaged ({error})") from error
        return _decode(image, name, max_pixels)


def _name(source: ImageSource) -> str:
    if isinstance(source, bytes):
        return f"<{len(source)} bytes>"
    if isinstance(source, Image.Image):
        return getattr(source, "filename", "") or "<picture>"
    return os.fspath(source)


def _open(source: str | os.PathLike[str] | bytes, name: str) -> BinaryIO:
    if isinstance(source, bytes):
        if not source:
            raise _unreadable(name, "there are no bytes")
        return io.BytesIO(source)
    if "://" in name:
        raise ImageReadError(
            f"The picture {name!r} is an address.", advice="Download it and give the file's path."
        )
    path = Path(source)
    try:
        # A device or a pipe would be read forever.
        if path.exists() and not path.is_file():
            raise _unreadable(name, "it is no regular file")
        stream = path.open("rb")
    except FileNotFoundError:
        raise _unreadable(name, "there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: a null byte in the path
        reason = error.strerror if isinstance(error, OSError) else None
        raise _unreadable(name, str(reason or error)) from error
    if path.stat().st_size == 0:
        stream.close()
        raise _unreadable(name, "the file is empty (0 bytes)")
    return stream


def _unreadable(name: str, reason: str) -> ImageReadError:
    return ImageReadError(
        f"The picture {name!r} cannot be read: {reason}.",
        advice="Check the path, and open the file in a picture viewer.",
    )


def _decode(image: Image.Image, name: str, max_pixels: int) -> Image.Image:
    width, height = image.size
    if width * height > max_pixels:
        raise _unreadable(
            name, f"it is too large ({width} x {height} pixels; at most {max_pixels} are decoded)"
        )
    if width * height == 0:
        raise _unreadable(name, "it has no pixels")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except _DECODE_ERRORS as error:
        raise _unreadable(name, f"it is damaged or cut off ({error})") from error


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith(("I", "F")):
        return _deep_grey(image).convert("RGB")
    if image.mode in ("LA", "PA", "La", "RGBA", "RGBa") or "transparency" in image.info:
        rgba = image.convert("RGBA")
        white = Image.new("RGBA", rgba.size, "white")
        return Image.alpha_composite(white, rgba).convert("RGB")
    return image.convert("RGB")


def _deep_grey(image: Image.Image) -> Image.Image:
    """Scales grey levels of more than 8 bits; Pillow's own conversion cuts them off at 255."""
    levels = np.asarray(image).astype(np.float64)
    if image.mode == "F":
        low, high = float(levels.min()), float(levels.max())  # floats have no defined white
    else:
        low, high = 0.0, 65535.0 if levels.max() <= 65535 else 2.0**31 - 1
    if not np.isfinite([low, high]).all():
        raise ValueError("grey levels that are not numbers")
    scaled = (levels - low) * (255.0 / (high - low) if high > low else 0.0)
    return Image.fromarray(np.clip(np.round(scaled), 0, 255).astype(np.uint8))
