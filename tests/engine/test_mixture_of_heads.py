"""MoH's gates and its router by query norms, SparseMM's budget: authors' numbers and by hand."""

from __future__ import annotations

import math

import pytest
import torch
from golden import arrays, golden

from mmlm.engine.mixture_of_heads import (
    cache_budget,
    load_balance,
    moh_gates,
    norm_routed,
    norm_shares,
)


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("moh/moh_*.npz"))
def test_ring_acceptance_5_golden(path):
    data = arrays(path)
    _, active, heads = data["shared_routed_heads"].tolist()
    gates = moh_gates(data["x"], data["wg"], data["wg_1"], data["wg_0"], active)
    assert torch.allclose(gates, data["gates"], rtol=0, atol=1e-5)
    loss = load_balance(data["x"], data["wg"], active)
    assert float(loss) == pytest.approx(float(data["load_balance_loss"]), abs=1e-6)
    kept = norm_routed(data["llama_q"].unflatten(-1, (heads, -1)))
    assert torch.equal(kept, data["llama_mask"].bool())


def test_gates_by_hand():
    x = torch.tensor([1.0, 0.0])
    routed = torch.tensor([[math.log(3), 5.0], [0.0, 7.0], [math.log(2), 1.0]])
    only = moh_gates(x, routed, None, None, 2)
    assert only.tolist() == pytest.approx([2 * 3 / 5, 0, 2 * 2 / 5])
    shared = torch.tensor([[0.0, 1.0], [math.log(3), 1.0]])
    assert moh_gates(x, None, shared, None, 0).tolist() == pytest.approx([0.5, 1.5])
    split = torch.tensor([[0.0, 9.0], [math.log(3), 9.0]])
    both = moh_gates(x, routed, shared, split, 2).tolist()
    assert both == pytest.approx([0.25, 0.75, 1.8, 0, 1.2])


def test_routing_that_is_even_has_a_loss_of_the_active_share():
    # Every head gets half of the tokens, and half of the probability.
    x = torch.eye(2)
    routed = torch.tensor([[4.0, -4.0], [-4.0, 4.0]])
    assert float(load_balance(x, routed, 1)) == pytest.approx(4 * 0.25)
    unfair = load_balance(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), routed, 1)
    assert float(unfair) > 1.9


def test_norms_by_hand():
    q = torch.zeros(4, 2)
    q[:, 0] = torch.tensor([1.0, 2.0, 3.0, 4.0])
    scaled = torch.tensor([1.0, 2.0, 3.0, 4.0]) / math.sqrt(5 / 3)
    assert torch.allclose(norm_shares(q), scaled.softmax(-1))
    assert norm_routed(q).tolist() == [True, True, False, True]
    assert torch.allclose(norm_shares(torch.ones(4, 2)), torch.full((4,), 0.25))


def test_heads_without_a_quarter_are_refused():
    with pytest.raises(ValueError, match="6 heads have no quarter"):
        norm_routed(torch.zeros(6, 2))


# ---- SparseMM ---------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(3))
def test_ring_acceptance_4_caps_add_up(seed):
    scores = torch.rand(5, 8, generator=torch.Generator().manual_seed(seed))
    caps = cache_budget(scores, kv_heads=4, budget=160)
    assert caps.shape == (5, 4)
    assert abs(int(caps.sum()) - 5 * 4 * (160 - 32)) <= 0.5 * 20
    share = scores.unflatten(-1, (4, 2)).sum(-1) / scores.sum()
    low = int(128 * 0.1)
    exact = share.double() * (128 - low) * 20 + low
    assert float((caps - exact).abs().max()) <= 0.5 + 1e-3


def test_ring_acceptance_4_equal_scores_get_equal_caps():
    caps = cache_budget(torch.ones(3, 8), kv_heads=2, budget=96)
    assert caps.tolist() == [[64, 64]] * 3


def test_caps_by_hand():
    scores = torch.tensor([[3.0, 1.0, 0.0, 0.0]])
    # b = 20, low = 4; shares 1 and 0; 1 * 16 * 2 + 4 and 4
    assert cache_budget(scores, kv_heads=2, budget=22, window=2, ratio=0.2).tolist() == [[36, 4]]
    assert cache_budget(scores, kv_heads=4, budget=20, window=0, ratio=1).tolist() == [[20] * 4]


def test_ring_acceptance_4_scores_of_zeros_are_refused():
    with pytest.raises(ValueError, match="not all 0"):
        cache_budget(torch.zeros(2, 4), kv_heads=2, budget=64)


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"kv_heads": 3}, "4 heads do not share 3"),
        ({"kv_heads": 0}, "do not share 0"),
        ({"budget": 32}, "window must be >= 0 and below the budget 32"),
        ({"window": -1}, "window"),
        ({"ratio": 1.5}, "ratio must be >= 0 and <= 1"),
    ],
)
def test_numbers_out_of_range_are_refused(wrong, match):
    with pytest.raises(ValueError, match=match):
        cache_budget(torch.ones(2, 4), **{"kv_heads": 2, "budget": 64, **wrong})


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_scores_that_are_no_scores_are_refused(bad):
    scores = torch.ones(2, 4)
    scores[1, 2] = bad
    with pytest.raises(ValueError, match="scores must be >= 0"):
        cache_budget(scores, kv_heads=2, budget=64)
