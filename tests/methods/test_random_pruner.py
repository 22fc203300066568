"""RandomPruner: the floor."""

import checks
import pytest
import tiny
import torch

from mmlm import attach, measured
from mmlm.methods.random_pruner import RandomPruner


def kept(model, inputs, **options):
    with torch.no_grad(), attach(model, RandomPruner(**options)):
        model(**inputs)
        return [row["random_pruner"]["kept"] for row in measured(model)]


def test_the_first_of_a_permutation_stay():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    assert kept(model, inputs, keep=5, seed=3) == [[sorted(order[:5].tolist())]] * 2
    assert kept(model, inputs, keep=5, seed=4) != kept(model, inputs, keep=5, seed=3)


def test_a_larger_budget_keeps_what_a_smaller_one_does():
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    small, large = (kept(model, inputs, keep=n)[0][0] for n in (4, 9))
    assert set(small) < set(large)


@pytest.mark.parametrize("family", ["qwen2_5_vl", "internvl"])
def test_units_stay_whole(family):
    model, processor = tiny.shared(family)
    inputs = checks.batch(processor)
    for row in kept(model, inputs, keep=8):
        assert [len(patches) for patches in row] == [8] * len(row)


@pytest.mark.parametrize("keep", [16, 500])
def test_dominance_acceptance_6_keeping_all_changes_nothing(keep):
    model, processor = tiny.shared("llava")
    inputs = checks.batch(processor)
    plain = checks.next_logits(model, inputs)
    with attach(model, RandomPruner(keep=keep)):
        assert torch.equal(checks.next_logits(model, inputs), plain)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 0}, "keep must be an integer >= 1"),
        ({"keep": 2.5}, "keep must be an integer >= 1"),
        ({"seed": -1}, "seed must be an integer >= 0"),
        ({"seed": 2**33}, "seed must be an integer >= 0 and <= 4294967296"),
        ({"positions": "new"}, "positions must be one of"),
    ],
)
def test_error_parameters_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        RandomPruner(**options)
