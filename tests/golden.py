"""Golden vectors, made by the authors' own code: where they lie and how tests get them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

_SHARED = Path(__file__).resolve().parents[2] / "shared"


def folder(variable: str, default: str) -> Path:
    """The folder that an environment variable names, or the one beside the repository."""
    return Path(os.environ.get(variable) or _SHARED / default)


def golden(pattern: str) -> list:
    """Parameters of a test: every file or folder of a pattern, or one skip that says what to do.

    Sets of the same format have other letters and numbers, so nothing is found by its full name.
    """
    root = folder("MMLM_GOLDEN", "golden")
    found = sorted(root.glob(pattern))
    if found:
        return [pytest.param(path, id=path.stem) for path in found]
    skip = pytest.mark.skip(reason=f"no {pattern} under {root}; name the folder with MMLM_GOLDEN")
    return [pytest.param(root, marks=skip, id="absent")]


def arrays(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of one .npz file."""
    with np.load(path) as data:
        return {name: torch.from_numpy(np.asarray(data[name])) for name in data.files}


def arrays_of_numbers(path: Path) -> dict[str, torch.Tensor]:
    """The arrays of one .npz file without its texts."""
    with np.load(path) as data:
        names = [name for name in data.files if data[name].dtype.kind != "U"]
        return {name: torch.from_numpy(np.asarray(data[name])) for name in names}
