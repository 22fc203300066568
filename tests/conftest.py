"""Puts the shared test helpers on the path and turns the shapes in signatures into checks."""

import gc
import importlib
import sys
from pathlib import Path
from types import FunctionType

import pytest

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE / "contract")]


def _check_shapes(owner, name):
    """Replaces a function by one that checks the shapes and types in its signature."""
    from beartype import beartype
    from jaxtyping import jaxtyped

    function = getattr(owner, name)
    if isinstance(function, FunctionType):
        setattr(owner, name, jaxtyped(function, typechecker=beartype))


@pytest.fixture(autouse=True, scope="session")
def _shapes_are_checked():
    """Every method's pure functions and site functions; users pay nothing for it."""
    import mmlm
    from mmlm.engine import combine

    for name in combine.__all__:
        _check_shapes(combine, name)
    for name in [*mmlm.method_names(), *mmlm._PROBES]:
        cls = getattr(mmlm, name)
        module = importlib.import_module(cls.__module__)
        for public in module.__all__:
            _check_shapes(module, public)
        for site in cls().sites:
            _check_shapes(cls, site)


def pytest_collection_modifyitems(items):
    """Long tests first (a stable sort): at the end no process then waits for another's last one."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """What imports left stays: every training collects garbage, and need not look at it again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _fixed_seed():
    import torch

    if torch.cuda.is_available():
        torch.manual_seed(0)
    else:  # the same; but that one notes a traceback for every accelerator that is not there
        torch.default_generator.manual_seed(0)
