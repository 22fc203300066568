"""The server that most tests of `mmlm serve` share."""

import pytest
from served import running

import mmlm


@pytest.fixture(scope="package")
def served():
    """The embedded model with default limits, shared by all tests."""
    with running(offered=("VHR(alpha=2.0)",)) as server:
        yield server


@pytest.fixture(scope="package")
def embedded():
    """The embedded model, not the one that is served."""
    return mmlm.load("embedded")
