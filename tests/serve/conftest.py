"""The server that most tests of `mmlm serve` share."""

import pytest
from served import running


@pytest.fixture(scope="package")
def served():
    """The embedded model with default limits, shared by all tests."""
    with running(offered=("VHR(alpha=2.0)",)) as server:
        yield server
