"""docs/effects.md on visual heads: what is measured, and that its tables are what is stored."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tool():
    sys.path.insert(0, str(ROOT / "tools"))
    import measure_heads

    yield measure_heads
    sys.path.remove(str(ROOT / "tools"))


def test_the_tables_are_those_of_the_stored_records():
    check = [sys.executable, "tools/measure_heads.py", "--check"]
    assert subprocess.run(check, cwd=ROOT).returncode == 0, "run: tools/measure_heads.py --page"


def test_controls_have_as_many_other_heads_of_the_same_layers(tool):
    for arm in tool.arms():
        own = dict(tool._heads(arm.visual))
        assert sum(map(len, own.values())) == arm.top
        for control in arm.controls:
            drawn = dict(tool._heads(control))
            assert {n: len(h) for n, h in drawn.items()} == {n: len(h) for n, h in own.items()}
            assert all(not set(own[n]) & set(h) for n, h in drawn.items())
        assert len({c.path for c in (arm.visual, *arm.controls)}) == 1 + len(arm.controls)


def test_areas_under_the_curve_are_shares_of_pairs_that_are_won(tool):
    rng = np.random.default_rng(0)
    picture, true = rng.integers(0, 5, 40), rng.random(40) < 0.6
    values = rng.integers(0, 6, (40, 3)).astype(float)
    wins = tool.Wins.of(picture, true, values)
    n = len(np.unique(picture))

    def naive(weights):
        won = pairs = 0.0
        for i in np.flatnonzero(true):
            for j in np.flatnonzero(~true):
                weight = weights[picture[i]] * weights[picture[j]]
                for draw in range(3):
                    won += weight / 3 * ((a := values[i, draw]) > (b := values[j, draw]))
                    won += weight / 3 * 0.5 * (a == b)
                pairs += weight
        return won / pairs

    for weights in (np.ones(n), np.array([2.0, 0, 1, 1, 1])[:n]):
        assert wins.auc(weights[None])[0] == pytest.approx(naive(weights))


def test_pooled_runs_are_means_of_counts(tool):
    from benchmarks.base import CountTable

    one = CountTable(("n",), ("a", "b"), np.array([[1.0], [3.0]]), {})
    other = CountTable(("n",), ("a", "b"), np.array([[2.0], [5.0]]), {})
    assert tool.pooled([one, other]).counts.tolist() == [[1.5], [4.0]]
