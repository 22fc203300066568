"""Where the pictures of records are: beside the file, in a folder, or as bytes inside a table."""

from __future__ import annotations

import hashlib
import io
import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, TypeAlias

from data_tools.convert.preference import RecordError
from mmlm.errors import ImageReadError
from mmlm.inputs import load_image

__all__ = ["Check", "Pictures"]

Check: TypeAlias = Literal["nothing", "exists", "decodes"]
_ENDINGS = {"JPEG": ".jpg", "PNG": ".png", "WEBP": ".webp", "GIF": ".gif", "BMP": ".bmp"}


class Pictures:
    """Finds pictures; writes out those that come as bytes, once per content.

    Args:
        folder: What relative paths are relative to.
        store: Where bytes are written, as ``<sha256>.<ending>``; made when it is needed.
        check: Whether a picture must be there, or also decode.
    """

    def __init__(self, folder: Path, store: Path, check: Check = "exists") -> None:
        self._folder = folder.absolute()
        self._store = store.absolute()
        self._check = check
        self._known: set[str] = set()

    def path(self, value: Any) -> str:
        """The path of a picture.

        Args:
            value: A path, or ``{"bytes", "path"}`` as Hugging Face tables have it.

        Raises:
            RecordError: If it is neither, or the check fails.
        """
        if isinstance(value, Mapping) and value.get("bytes") is not None:
            return self._stored(value["bytes"])
        text = value.get("path") if isinstance(value, Mapping) else value
        if not isinstance(text, str) or not text:
            raise RecordError(f"a picture is {type(text).__name__}, not a path or bytes")
        path = os.path.normpath(self._folder / text)
        self._checked(path)
        return path

    def of_id(self, identifier: str) -> str:
        """The picture whose file is named after an identifier, anywhere in the folder.

        Raises:
            RecordError: If there is none.
        """
        if identifier not in self._by_stem:
            raise RecordError(
                f"it names no file, and there is no {identifier}.jpg or the like in "
                f"{str(self._folder)!r} (--images)"
            )
        path = self._by_stem[identifier]
        self._checked(path)
        return path

    @cached_property
    def _by_stem(self) -> dict[str, str]:
        endings = {*_ENDINGS.values(), ".jpeg"}
        return {
            path.stem: str(path)
            for path in sorted(self._folder.rglob("*"), reverse=True)
            if path.suffix.lower() in endings
        }

    def _checked(self, path: str) -> None:
        if self._check == "nothing" or path in self._known:
            return
        if self._check == "exists" and not os.path.isfile(path):
            raise RecordError(f"there is no picture {path!r}")
        if self._check == "decodes":
            try:
                load_image(path)
            except ImageReadError as error:
                raise RecordError(str(error)) from error
        self._known.add(path)

    def _stored(self, content: bytes) -> str:
        from PIL import Image

        try:
            with Image.open(io.BytesIO(content)) as image:
                ending = _ENDINGS.get(image.format or "", f".{(image.format or 'bin').lower()}")
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise RecordError(f"the picture's {len(content)} bytes are no picture") from error
        path = self._store / f"{hashlib.sha256(content).hexdigest()}{ending}"
        if not path.exists():
            self._store.mkdir(parents=True, exist_ok=True)
            temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
            temporary.write_bytes(content)
            temporary.replace(path)
        self._checked(str(path))
        return str(path)
