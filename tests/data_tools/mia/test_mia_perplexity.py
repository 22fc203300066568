"""Perplexity: by hand, of written tokens against the most probable ones, and without a value."""

from __future__ import annotations

import math

import pytest
import torch

from data_tools.mia.perplexity import log_probabilities, perplexity


def test_by_hand():
    logits = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    assert perplexity(log_probabilities(logits)) == pytest.approx((0.5 * 0.8) ** -0.5)
    written = log_probabilities(logits, torch.tensor([1, 2]))
    assert written.exp().tolist() == pytest.approx([0.25, 0.1])
    assert perplexity(written) == pytest.approx((0.25 * 0.1) ** -0.5)


def test_logits_need_not_be_normalised():
    logits = torch.randn(4, 10).double()
    torch.testing.assert_close(log_probabilities(logits + 7), log_probabilities(logits))
    half = log_probabilities(logits.bfloat16())
    torch.testing.assert_close(half, log_probabilities(logits.bfloat16().float()))


def test_what_was_written_is_never_likelier_than_the_most_probable():
    logits, tokens = torch.randn(50, 20), torch.randint(0, 20, (50,))
    assert bool((log_probabilities(logits, tokens) <= log_probabilities(logits)).all())


def test_certainty_is_one_and_nothing_is_none():
    assert perplexity([0.0, 0.0]) == 1.0
    assert perplexity([]) is None
    assert perplexity([-math.inf, -1.0]) is None
    assert perplexity([math.nan]) is None
    assert perplexity([-1000.0]) is None  # no float holds it
