"""Tables that ship inside our packages, as JSON, the large ones packed."""

from __future__ import annotations

import json
import lzma
from importlib import resources
from typing import Any

__all__ = ["load_table"]


def load_table(name: str, package: str = "mmlm.language") -> Any:
    """Reads a JSON table from a package's ``data`` folder; ``.xz`` files are unpacked.

    Args:
        name: The file's name.
        package: The package that ships it.
    """
    raw = resources.files(package).joinpath("data", name).read_bytes()
    return json.loads(lzma.decompress(raw) if name.endswith(".xz") else raw)
