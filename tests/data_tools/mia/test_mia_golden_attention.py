"""Attention and perplexity against the authors' functions (golden vectors)."""

from __future__ import annotations

import re

import pytest
import torch
from golden import arrays, golden

from data_tools.mia.attention import image_sums, key_attention, shares
from data_tools.mia.perplexity import log_probabilities, perplexity
from data_tools.mia.regions import central_square, equal_blocks

PLACEHOLDER = -200
TOKENS = 576
pytestmark = pytest.mark.golden


def positions(ids, tokens=TOKENS):
    """Keys of every image once each placeholder has become its tokens."""
    found, at = [], 0
    for token in ids.tolist():
        if token == PLACEHOLDER:
            found.append(torch.arange(at, at + tokens))
        at += tokens if token == PLACEHOLDER else 1
    return found, at


@pytest.mark.parametrize("path", golden("mia_dpo/sequence_attention*.npz"))
def test_acceptance_1_ratios_of_a_sequence(path):
    data = arrays(path)
    names = sorted({name.split("_")[0] for name in data})
    assert names
    for name in names:
        images, length = positions(data[f"{name}_input_ids"])
        assert length == int(data[f"{name}_prefill_len"])
        assert [int(own[0]) for own in images] == data[f"{name}_image_start"].tolist()
        rows = data[f"{name}_rows"].transpose(0, 1)  # [H, R, K]
        for chunks in ([rows], list(rows.split(1, dim=1))):
            attention = key_attention(chunks, length)
            sums = image_sums(attention, images)
            means = torch.tensor(sums) / (TOKENS * rows.shape[1])
            torch.testing.assert_close(means.double(), data[f"{name}_means"], rtol=1e-5, atol=1e-9)
            expected = data[f"{name}_ratio"].tolist()
            assert shares(sums) == pytest.approx(expected, abs=1e-6)
            assert shares(sums, [TOKENS] * len(images)) == pytest.approx(expected, abs=1e-6)
        maps = torch.stack([attention[own] for own in images]) / rows.shape[1]
        torch.testing.assert_close(
            maps.view(-1, 24, 24), data[f"{name}_maps"].double(), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize("path", golden("mia_dpo/grid_pip_ppl*.npz"))
def test_acceptance_1_map_of_a_composed_picture(path):
    data = arrays(path)
    (image,), length = positions(data["single_input_ids"])
    rows = data["single_rows"].transpose(0, 1)
    found = (key_attention([rows], length)[image] / rows.shape[1]).view(24, 24)
    torch.testing.assert_close(found, data["single_map"].double(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("path", golden("mia_dpo/grid_pip_ppl*.npz"))
def test_acceptance_1_blocks_and_centre(path):
    data = arrays(path)
    seen = 0
    for name, expected in data.items():
        block = re.fullmatch(r"grid_(.+)_(\d+)x(\d+)_(ratio|block_sum)", name)
        if block:
            grid = _grid(data, block[1])
            sums = equal_blocks(grid, int(block[2]), int(block[3]))
            values = shares(sums) if block[4] == "ratio" else sums
            assert values == pytest.approx(expected.tolist(), rel=1e-6, abs=1e-6), name
            seen += 1
        centre = re.fullmatch(r"pip_(.+)_ratio", name)
        if centre:
            grid = _grid(data, centre[1])
            ratio = central_square(grid) / float(grid.double().sum())
            assert ratio == pytest.approx(float(expected), abs=1e-6), name
            seen += 1
    assert seen


def _grid(data, name):
    return data[name if name in data else f"{name}_map"]


@pytest.mark.parametrize("path", golden("mia_dpo/grid_pip_ppl*.npz"))
def test_acceptance_1_perplexity(path):
    data = arrays(path)
    names = [name for name in data if re.fullmatch(r"ppl\d+_scores", name)]
    assert names
    for name in names:
        log_max = log_probabilities(data[name])
        stem = name.removesuffix("_scores")
        torch.testing.assert_close(log_max.exp(), data[f"{stem}_max_prob"], rtol=1e-5, atol=1e-7)
        assert perplexity(log_max) == pytest.approx(float(data[f"{stem}_ppl"]), rel=1e-5)
        greedy = log_probabilities(data[name], data[name].argmax(-1))
        assert perplexity(greedy) == pytest.approx(perplexity(log_max))
