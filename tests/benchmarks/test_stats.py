"""Bootstrap: exact where it can be, calibrated where it cannot, deterministic always."""

import numpy as np
import pytest

from benchmarks import stats
from benchmarks.base import CountTable, Ratio
from mmlm.errors import InputError


def share(sums):
    return stats.ratio(sums[..., 0], sums[..., 1])


def coin(n, p, seed):
    hits = np.random.default_rng(seed).random(n) < p
    return np.stack([hits, np.ones(n)], axis=1).astype(float)


def test_width_is_that_of_the_binomial():
    # 500 images, 45 %: standard error sqrt(0.45 * 0.55 / 500) = 2.2 points, so 95 % is +- 4.4.
    counts = np.stack([np.arange(500) < 225, np.ones(500)], axis=1).astype(float)
    interval = stats.bootstrap_interval(counts, share)
    assert interval.low == pytest.approx(0.45 - 0.0436, abs=0.005)
    assert interval.high == pytest.approx(0.45 + 0.0436, abs=0.005)
    assert (interval.level, interval.resamples) == (0.95, 1000)


def test_interval_covers_the_truth_about_as_often_as_it_says():
    inside = 0
    for seed in range(200):
        interval = stats.bootstrap_interval(coin(100, 0.4, seed), share, seed=seed, resamples=300)
        inside += interval.low <= 0.4 <= interval.high
    assert 178 <= inside <= 199


def test_same_seed_same_interval_other_seed_another():
    counts = coin(500, 0.5, 1)

    def interval(seed):
        return stats.bootstrap_interval(counts, share, seed=seed, resamples=30)

    assert interval(0) == interval(0)
    assert interval(0) != interval(1)


def test_no_variation_no_width():
    counts = np.tile([1.0, 2.0], (10, 1))
    interval = stats.bootstrap_interval(counts, share)
    assert (interval.low, interval.high) == (0.5, 0.5)


def test_undefined_statistic_has_no_interval():
    assert stats.bootstrap_interval(np.zeros((5, 2)), share) is None
    assert stats.paired_bootstrap(np.zeros((5, 2)), np.ones((5, 2)), share).value is None


def test_resamples_without_the_only_defined_image_are_left_out():
    counts = np.array([[1.0, 1.0], [0.0, 0.0]])
    interval = stats.bootstrap_interval(counts, share)
    # Half of the draws of 2 with replacement contain ... 1 - (1/2)^2 = 3/4 contain image 0.
    assert 680 < interval.resamples < 820
    assert (interval.low, interval.high) == (1.0, 1.0)


def test_pairing_removes_the_difficulty_of_the_images():
    source = np.random.default_rng(0)
    base = (source.random(300) < 0.5).astype(float)
    better = base.copy()
    better[np.flatnonzero(base)[:15]] = 0.0  # 15 of 300 images improve, none gets worse
    ones = np.ones(300)
    a, b = np.stack([base, ones], 1), np.stack([better, ones], 1)
    paired = stats.paired_bootstrap(a, b, share)
    assert paired.value == pytest.approx(-0.05)
    assert paired.is_clear
    assert paired.interval.high < 0
    # Unpaired, the two intervals overlap.
    assert stats.bootstrap_interval(b, share).high > stats.bootstrap_interval(a, share).low


def test_a_run_compared_with_itself_is_exactly_equal():
    counts = coin(40, 0.3, 2)
    difference = stats.paired_bootstrap(counts, counts, share)
    assert difference.value == 0.0
    assert (difference.interval.low, difference.interval.high) == (0.0, 0.0)
    assert not difference.is_clear


def test_groups_are_images_not_samples():
    counts = stats.group_counts(["b", "a", "b"], [[1, 1], [0, 1], [1, 1]])
    assert counts.tolist() == [[0, 1], [2, 2]]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: stats.group_counts([], []), "no samples"),
        (lambda: stats.group_counts([1], [[1], [2]]), "Got 1 groups for 2 rows"),
        (lambda: stats.bootstrap_interval(np.zeros(3), share), "at least one image"),
        (lambda: stats.bootstrap_interval(np.zeros((0, 2)), share), "at least one image"),
        (lambda: stats.bootstrap_interval(np.ones((2, 2)), share, resamples=0), "resamples"),
        (lambda: stats.bootstrap_interval(np.ones((2, 2)), share, level=1.0), "level"),
        (lambda: stats.paired_bootstrap(np.ones((2, 2)), np.ones((3, 2)), share), "one shape"),
    ],
)
def test_bad_arguments(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_mean_of_ratios_is_undefined_if_one_is():
    ratios = {
        "mean": (Ratio(("a",), ("n",)), Ratio(("b",), ("m",))),
        "a": Ratio(("a",), ("n",)),
    }
    table = CountTable.build([1, 2], [{"a": 1, "n": 2, "b": 1, "m": 1}] * 2, ratios)
    assert table.measure("mean").value == 0.75
    empty = CountTable.build([1], [{"a": 1, "n": 2, "b": 0, "m": 0}], ratios)
    assert empty.measure("mean").value is None
    assert empty.measure("a").value == 0.5


def test_comparing_different_images_is_refused():
    ratios = {"share": Ratio(("a",), ("n",))}
    one = CountTable.build([1, 2], [{"a": 1, "n": 1}] * 2, ratios)
    two = CountTable.build([1, 3], [{"a": 1, "n": 1}] * 2, ratios)
    with pytest.raises(InputError, match="2 stand in one run only"):
        one.difference(two, "share")
