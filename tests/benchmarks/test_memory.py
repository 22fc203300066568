"""Peak memory grows with the prompt as it does without a method: nothing of N x N is ever made."""

import pytest
import torch

import mmlm
from benchmarks.memory import SIDES, PeakBytes, attention_methods, grown, growth
from benchmarks.naive import naive_var
from benchmarks.speed_model import PATCH, Shape, build_model, build_processor, make_task

SHAPE = Shape(layers=3, width=64, heads=8, intermediate=64, tower=(2, 32, 1))


@pytest.fixture(scope="module")
def peaks():
    """Peak bytes at 1,024, 2,025 and 4,096 image tokens, of plain and of every attention method."""
    methods = attention_methods(SHAPE.layers)
    assert {"ACT", "ImbalancedAttention", "PAI", "VAR", "ZeroTuning"} <= {
        type(method).__name__ for method in methods
    }
    return growth([None, *methods], shape=SHAPE)


@pytest.mark.slow
def test_the_peak_of_every_attention_method_grows_linearly(peaks):
    plain = peaks.pop("plain")
    assert grown(plain) == pytest.approx(1, abs=0.05)
    for name, by_length in peaks.items():
        assert grown(by_length) < 1.05, name
        extra = [by_length[n] - plain[n] for n in sorted(plain)]
        # A few chunks of 16 MiB; one N x N matrix of 8 heads would be 512 MiB.
        assert extra[-1] < 128 << 20, name


@pytest.mark.slow
def test_whole_matrices_are_noticed():
    """The same figures of a naive run grow quadratically."""
    method = mmlm.parse_method("VAR(tau=2.5, sink_dims=(3, 5))")
    peaks = {}
    for side in (16, 23, 32):
        shape = Shape(layers=3, width=64, heads=16, tower=(2, 32, 1), side=PATCH * side)
        task = make_task(build_model(shape), build_processor(shape), 1, shape.side)
        with PeakBytes() as follower:
            naive_var(method, task, 1, lambda: None)
        peaks[shape.image_tokens] = follower.peak
    assert grown(peaks) > 1.3  # the bound above is 1.05


def test_bytes_are_followed_until_they_are_freed():
    kept = torch.zeros(1000)  # existed before: never counted, nor are views of it
    with PeakBytes() as follower:
        a = kept + 1
        view = a.view(10, 100)
        assert follower.live == 4000
        b = view * 2
        assert follower.live == 8000
        del a, view
        assert follower.live == 4000
        del b
        assert follower.live == 0
        kept.view(10, 100)
        assert follower.live == 0
    assert follower.peak == 8000


def test_growth_is_an_exponent():
    assert grown({100: 10, 200: 20, 400: 30}) == pytest.approx(1)
    assert grown({100: 1, 200: 4, 400: 16}) == pytest.approx(2)
    assert SIDES == (32, 45, 64)
