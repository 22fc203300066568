"""A picture with its identity: what detectors and generators are given."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

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
        # From the path, not from bytes: messages name the file, and no device is read forever.
        image = load_image(path)
        with path.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").hexdigest()
        return cls(identifier, path, image, digest)
