"""Every listed fault is noticed by its check, and the check passes without the fault."""

import pytest
import tiny
from mutants import MUTANTS


@pytest.fixture(autouse=True)
def _own_models():
    """A fault may leave hooks on the shared models."""
    tiny.shared.cache_clear()
    yield
    tiny.shared.cache_clear()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name.replace(" ", "_"))
def test_fault_is_noticed(mutant, monkeypatch):
    mutant.check()
    monkeypatch.setattr(mutant.target, mutant.attribute, mutant.fault)
    with pytest.raises(BaseException):  # noqa: B017  (a crash is as good as a failed check)
        mutant.check()
