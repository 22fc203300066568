"""Where golden vectors and data lie; both are optional and named by environment variables."""

import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]


def folder(variable: str, default: str) -> Path:
    return Path(os.environ.get(variable) or REPOSITORY.parent / "shared" / default)


@pytest.fixture(scope="session")
def data_folder() -> Path:
    path = folder("MMLM_DATA", "data")
    if not path.is_dir():
        pytest.skip(f"no data folder at {path}; name one with MMLM_DATA")
    return path


def golden_folders(pattern: str) -> list:
    """Folders of a golden set: ``<root>/<pattern>`` and its siblings of the same format."""
    root = folder("MMLM_GOLDEN", "golden")
    found = sorted(path for path in root.glob(pattern) if path.is_dir())
    if found:
        return [pytest.param(path, id=path.name) for path in found]
    skip = pytest.mark.skip(reason=f"no {pattern} under {root}; name the folder with MMLM_GOLDEN")
    return [pytest.param(root, marks=skip, id="absent")]
