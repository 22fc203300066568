"""A picture with its identity: what detectors and generators are given."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from mmlm.errors import ImageReadError
from mmlm.inputs import load_image

__all__ = ["Picture"]


@dataclass(frozen=True)
class Picture:
    """A decoded picture.

    Attributes:
        id: Identifier of its record in the run.
        path: Where it was read.
        image: RGB pixels, turned as its EXIF record says.
        sha256: Hash of the file's bytes, hex: the key of everything computed from the picture.
    """

    id: str
    path: Path
    image: Image.Image = field(repr=False, compare=False)
    sha256: str

    @classmethod
    def read(cls, identifier: str, path: Path) -> Picture:
        """Reads and decodes a picture completely.

        Args:
            identifier: Identifier of its record.
            path: The file.

        Raises:
            ImageReadError: If the file is missing, empty, damaged, cut off or too large.
        """
        try:
            content = path.read_bytes()
        except OSError as error:
            raise ImageReadError(
                f"The picture {str(path)!r} cannot be read: {error.strerror or error}.",
                advice="Check the path.",
            ) from error
        # From the path, not from the bytes: messages name the file.
        return cls(identifier, path, load_image(path), hashlib.sha256(content).hexdigest())
