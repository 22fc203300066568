"""Where the tokens of a picture lie in it: grids by hand, and by changing pixels."""

from __future__ import annotations

import gc

import pytest
import tiny
import torch

import mmlm
from mmlm import token_places
from mmlm.errors import UnsupportedModel
from mmlm.inputs import message, prepare
from mmlm.token_brightness import KNOWN
from mmlm.token_places import footprints


def centres(places):
    """Centre of each token, down and across, in [0, 1]; nan for tokens that show nothing."""
    rows, columns = places.shape
    down = places.down @ ((torch.arange(rows) + 0.5) / rows)
    across = places.across @ ((torch.arange(columns) + 0.5) / columns)
    seen = places.down.sum(1) > 0
    return torch.where(seen, down, torch.nan), torch.where(seen, across, torch.nan)


def grid(rows, columns, top=0.0, bottom=1.0, left=0.0, right=1.0):
    """Centres of a grid of tokens over a part of the picture, line by line."""
    down = top + (torch.arange(rows) + 0.5) / rows * (bottom - top)
    across = left + (torch.arange(columns) + 0.5) / columns * (right - left)
    return down.repeat_interleave(columns), across.repeat(rows)


def assert_places(family, size, shape, *parts):
    model, processor = tiny.shared(family)
    places = footprints(model, processor, size)
    assert places.shape == shape
    down, across = centres(places)
    expected = [torch.cat(x) for x in zip(*parts, strict=True)]
    assert places.tokens == len(expected[0])
    for found, known in zip((down, across), expected, strict=True):
        torch.testing.assert_close(found, known, atol=0.02, rtol=0, equal_nan=True)


def with_line_ends(lines, x):
    """Behind each of some lines a token that shows nothing."""
    return torch.nn.functional.pad(x.view(lines, -1), (0, 1), value=torch.nan).flatten()


def test_llava_is_one_grid_and_crops_wide_pictures():
    assert_places("llava", (112, 112), (4, 4), grid(4, 4))
    # The middle square: the sides are in no token.
    assert_places("llava", (168, 56), (4, 12), grid(4, 4, left=1 / 3, right=2 / 3))


def test_llava_next_is_an_overview_and_tiles_with_line_ends():
    overview, tiles = grid(4, 4), grid(8, 8)
    ended = [with_line_ends(8, x) for x in tiles]
    assert_places("llava_next", (112, 112), (8, 8), overview, ended)


def test_qwen_merges_patches_on_the_pictures_own_grid():
    assert_places("qwen2_5_vl", (112, 112), (4, 4), grid(4, 4))
    assert_places("qwen2_5_vl", (96, 64), (2, 3), grid(2, 3))


def test_internvl_is_tiles_and_then_an_overview():
    tiles = [grid(2, 2, right=0.5), grid(2, 2, left=0.5)]
    assert_places("internvl", (96, 48), (2, 4), *tiles, grid(2, 2))


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("size", [(112, 112), (96, 64), (64, 160), (50, 37)])
def test_nothing_is_lost_or_doubled(family, size):
    model, processor = tiny.shared(family)
    places = footprints(model, processor, size)
    for part in (places.down, places.across):
        sums = part.sum(1)
        assert bool(((sums - 1).abs() < 1e-5).logical_or(sums == 0).all())
        assert bool((part >= 0).all())
    values = torch.rand(3, places.tokens)
    seen = places.down.sum(1) > 0
    spread = places.spread(values)
    assert spread.shape == (3, *places.shape)
    torch.testing.assert_close(spread.sum((1, 2)), values[:, seen].sum(1))


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("size", [(112, 112), (96, 64)])
def test_tokens_change_with_the_pixels_that_they_show(family, size):
    """With a tower that lets every patch pass alone, noise in a corner changes its tokens only."""
    model, processor = tiny.build(family)
    for block in mmlm.Anatomy(model).tower_blocks:
        block.forward = lambda x, *args, **kwargs: x
    places = footprints(model, processor, size)
    rows, columns = places.shape
    width, height = size[0] * (columns // 2) // columns, size[1] * (rows // 2) // rows
    picture = tiny.picture(5, size)
    before = features(model, processor, picture)
    half_down, half_across = places.down[:, : rows // 2], places.across[:, : columns // 2]
    inside = half_down.sum(1) * half_across.sum(1)
    other = picture.copy()
    other.paste(tiny.picture(9, (width, height)), (0, 0))
    moved = (features(model, processor, other) - before).abs().amax(-1)
    # Resampling reaches a pixel or two beyond the border: a trace of what happens within.
    outside = (inside < 0.01) & (places.down.sum(1) > 0)
    within = moved[inside > 0.9]
    assert len(within)
    assert bool(outside.any())
    assert float(moved[outside].max()) < 0.2 * float(within.min())


def features(model, processor, picture):
    """Image features in the order of the sequence: [tokens, D], taken where they leave."""
    found = []
    composite = mmlm.Anatomy(model).composite
    real = composite.get_image_features

    def catch(*args, **kwargs):
        out = real(*args, **kwargs)
        pooled = out.pooler_output
        parts = [pooled] if isinstance(pooled, torch.Tensor) else pooled
        found.append(torch.cat([part.reshape(-1, part.shape[-1]) for part in parts]))
        return out

    composite.get_image_features = catch
    inputs = prepare(processor, [[message("user", "a", 1)]], [[picture]])
    with torch.inference_mode():
        model(**inputs)
    del composite.get_image_features
    return found[0]


def test_every_known_family_is_tested():
    assert set(tiny.ALL) == KNOWN


def test_a_family_that_is_not_known_is_refused(monkeypatch):
    model, processor = tiny.build("llava")
    monkeypatch.setattr(type(model.config), "model_type", "llava_of_tomorrow")
    with pytest.raises(UnsupportedModel, match=r"llava_of_tomorrow.*is not known") as caught:
        footprints(model, processor, (56, 56))
    assert "qwen2_5_vl" in caught.value.advice


def test_measured_once_per_size_and_forgotten_with_the_model(monkeypatch):
    gc.collect()
    model, processor = tiny.build("llava")
    runs = []
    real = token_places.brightness
    monkeypatch.setattr(token_places, "brightness", lambda *args: runs.append(1) or real(*args))
    first = footprints(model, processor, (56, 56))
    count = len(runs)
    assert footprints(model, processor, (56, 56)) is first
    assert len(runs) == count
    assert footprints(model, processor, (57, 56)) is not first
    held = len(token_places._cache)
    del model, first
    gc.collect()
    assert len(token_places._cache) == held - 1


def test_large_pictures_have_at_most_48_cells_a_side():
    steps = token_places._steps(torch.arange(80) / 80, torch.zeros(80))
    assert token_places._Combs.over(steps[0]) == token_places._Combs(48, 3)
    assert token_places._Combs.over(steps[1]) == token_places._Combs(1, 1)


def test_lines_of_very_tall_pictures_are_told_apart():
    down, right = grid(300, 4)
    beside, below = token_places._steps(right, down)
    assert token_places._Combs.over(below).cells == 48
    assert token_places._Combs.over(beside).cells == 4


def test_bands_are_told_apart_by_the_tokens_place():
    """Twelve bands in three combs; tokens see one, a part of three, and the last."""
    combs = token_places._Combs(12, 3)
    bands = torch.zeros(3, 12)
    bands[0, 4], bands[2, 11] = 1.0, 0.5
    bands[1, 6:9] = torch.tensor([0.25, 1.0, 0.75])
    seen = torch.stack([bands[:, i::3].sum(1) for i in range(3)])
    centre = torch.tensor([4.5, 7.6, 11.5]) / 12
    torch.testing.assert_close(combs.bands(seen, centre), bands)


def test_a_coarse_overview_beside_fine_tiles_has_combs_enough():
    fine, coarse = torch.full((40,), 1 / 40), torch.full((4,), 1 / 4)
    combs = token_places._Combs.over(torch.cat([fine, coarse]))
    assert combs.cells == 40
    assert combs.period >= 40 / 4 + 2


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize("size", [(112, 112), (96, 64), (64, 160), (50, 37), (300, 100)])
def test_combs_give_what_a_drawing_for_each_band_gives(family, size, monkeypatch):
    model, processor = tiny.shared(family)
    places = token_places._measured(model, processor, size)
    real = token_places._Combs.over

    def one_by_one(steps):
        cells = real(steps).cells
        return token_places._Combs(cells, cells)

    monkeypatch.setattr(token_places._Combs, "over", one_by_one)
    expected = token_places._measured(model, processor, size)
    torch.testing.assert_close(places.down, expected.down, atol=0.02, rtol=0)
    torch.testing.assert_close(places.across, expected.across, atol=0.02, rtol=0)


def test_a_llava_next_of_real_size_has_the_lines_of_its_tiles():
    """336 pixels a tile, 24 x 24 tokens: 640 x 480 fills 48 x 36 tokens of four tiles."""
    model, processor = tiny.build("llava_next")
    sizes = [[336, 672], [672, 336], [672, 672], [1008, 336], [336, 1008]]
    model.config.vision_config.image_size, model.config.vision_config.patch_size = 336, 14
    model.config.image_grid_pinpoints = processor.image_processor.image_grid_pinpoints = sizes
    processor.image_processor.size = {"shortest_edge": 336}
    processor.image_processor.crop_size = {"height": 336, "width": 336}
    processor.patch_size = 14
    places = footprints(model, processor, (640, 480))
    assert places.shape == (36, 48)
    assert places.tokens == 24 * 24 + 36 * (48 + 1)
    cover = places.spread(torch.ones(places.tokens))
    assert float(cover.max() / cover.min()) < 1.03  # evenly seen, by the overview and by tiles
    down, across = centres(places)
    for found, expected in zip((down[:576], across[:576]), grid(24, 24), strict=True):
        torch.testing.assert_close(found, expected, atol=0.005, rtol=0)
