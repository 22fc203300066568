"""Where golden vectors and data lie; both are optional and named by environment variables."""

from pathlib import Path

import pytest
from golden import folder


@pytest.fixture(scope="session")
def data_folder() -> Path:
    path = folder("MMLM_DATA", "data")
    if not path.is_dir():
        pytest.skip(f"no data folder at {path}; name one with MMLM_DATA")
    return path
