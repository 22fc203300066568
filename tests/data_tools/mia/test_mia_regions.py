"""Tiles of composed pictures and the tokens that show them, in every family."""

from __future__ import annotations

import inspect

import pytest
import tiny
import torch
from PIL import Image

import mmlm
from data_tools.mia.layouts import draw_grid
from data_tools.mia.layouts import grid as grid_layout
from data_tools.mia.prompting import Prompted
from data_tools.mia.ratios import Regions
from data_tools.mia.regions import (
    KNOWN,
    central_square,
    equal_blocks,
    region_sums,
    tile_shares,
)
from mmlm.errors import UnsupportedModel
from mmlm.inputs import message, prepare

WIDE = ((96, 64), [(0, 12, 44, 64), (52, 12, 96, 64)])
"""Two tiles with a label band above and a margin between them."""
INSET = ((128, 120), [(0, 0, 128, 120), (34, 30, 94, 90)])


def overlap(cells, size, start, end):
    """Part of each of ``cells`` equal cells over ``size`` pixels that [start, end) covers."""
    step = size / cells
    return torch.tensor(
        [max(0.0, min((i + 1) * step, end) - max(i * step, start)) / step for i in range(cells)]
    )


def rectangle(cells, size, tile):
    """The same for a square grid of cells over a picture: [cells * cells], by area."""
    x0, y0, x1, y1 = tile
    rows, columns = overlap(cells, size[1], y0, y1), overlap(cells, size[0], x0, x1)
    return (rows[:, None] * columns).flatten()


# ---- blocks of the authors ----


def test_equal_blocks_by_hand():
    grid = torch.arange(15.0).view(3, 5)
    # Rows 2 + 1, columns 3 + 2: what is left over goes to the first blocks.
    assert equal_blocks(grid, 2, 2) == [
        0 + 1 + 2 + 5 + 6 + 7,
        3 + 4 + 8 + 9,
        10 + 11 + 12,
        13 + 14,
    ]
    assert sum(equal_blocks(grid, 3, 3)) == grid.sum()


def test_blocks_and_centres_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="3 x 1 blocks"):
        equal_blocks(torch.ones(2, 5), 3, 1)
    with pytest.raises(ValueError, match="16 x 16"):
        central_square(torch.ones(15, 24))


def test_centre_by_hand():
    grid = torch.zeros(24, 24)
    grid[4, 4], grid[19, 19], grid[3, 4], grid[20, 20] = 1, 2, 4, 8
    assert central_square(grid) == 3


# ---- tiles ----


def test_failure_a_grid_that_is_not_divisible_goes_by_area():
    """Four tokens a side under three tiles a side: border tokens count in parts."""
    model, processor = tiny.shared("llava")
    tiles = [(0, 0, 56, 112), (56, 0, 112, 112)]
    odd = [(0, 0, 37, 112), (37, 0, 75, 112), (75, 0, 112, 112)]
    for own in (tiles, odd):
        found = tile_shares(model, processor, (112, 112), own)
        assert found[0] == pytest.approx(torch.ones(16), abs=1e-5)
        for part, tile in zip(found[1:], own, strict=True):
            assert part.tolist() == pytest.approx(rectangle(4, (112, 112), tile).tolist(), abs=0.02)
        assert found[1:].sum(0) == pytest.approx(torch.ones(16), abs=1e-2)


def test_what_the_processor_crops_away_is_nowhere():
    model, processor = tiny.shared("llava")  # the middle square of a wide picture
    left, middle = tile_shares(model, processor, (168, 56), [(0, 0, 40, 56), (56, 0, 112, 56)])[1:]
    assert float(left.max()) == 0
    assert middle.tolist() == pytest.approx([1.0] * 16, abs=0.06)


def test_padding_is_no_part_of_the_picture():
    model, processor = tiny.build("llava_next")
    whole = tile_shares(model, processor, (112, 56), [])[0]
    # Base tile of the squeezed picture, then two tiles side by side with a row end each.
    assert whole[:16].tolist() == pytest.approx([1.0] * 16, abs=1e-5)
    assert whole[16:].view(4, 9)[:, 8].tolist() == [0.0] * 4  # row ends show nothing
    assert whole[16:].view(4, 9)[:, :8].flatten().tolist() == pytest.approx([1.0] * 32, abs=1e-5)


@pytest.mark.parametrize("family", tiny.ALL)
@pytest.mark.parametrize(("size", "tiles"), [WIDE, INSET], ids=["wide", "inset"])
def test_tokens_of_a_tile_are_those_that_change_with_it(family, size, tiles):
    """With a tower that lets every patch pass alone, new pixels in a tile change its tokens."""
    model, processor = tiny.build(family)
    for block in mmlm.Anatomy(model).tower_blocks:
        block.forward = lambda x, *args, **kwargs: x
    shares = tile_shares(model, processor, size, tiles)
    picture = tiny.picture(5, size)
    before = features(model, processor, picture)
    for part, (x0, y0, x1, y1) in zip(shares[1:], tiles, strict=True):
        other = picture.copy()
        other.paste(tiny.picture(9, (x1 - x0, y1 - y0)), (x0, y0))
        moved = (features(model, processor, other) - before).abs().amax(-1)
        assert bool((moved[part > 0.03] > 1e-6).all())
        # Resampling reaches a pixel or two beyond a tile's border, never across a token.
        assert int(((part == 0) & (moved > 1e-6)).sum()) <= len(part) // 4
        inside, outside = moved[part > 0.5], moved[part == 0]
        if len(inside) and len(outside):
            assert float(inside.min()) > float(outside.median())


@pytest.mark.parametrize("family", tiny.ALL)
def test_tiles_of_a_collage_divide_it(family):
    model, processor = tiny.shared(family)
    layout = grid_layout(4, (60, 60), 10)
    shares = tile_shares(model, processor, layout.size, layout.boxes)
    whole, tiles = shares[0], shares[1:]
    assert float(shares.min()) >= 0
    assert float(shares.max()) <= 1
    assert bool((tiles.sum(0) <= whole + 0.05).all())  # the margins belong to none
    sizes = tiles.sum(1)
    assert sizes.tolist() == pytest.approx([float(sizes.mean())] * 4, rel=0.25)


def test_every_known_family_is_tested():
    assert set(tiny.ALL) == KNOWN


def test_failure_a_family_whose_way_to_tokens_is_not_known_is_refused(monkeypatch):
    model, processor = tiny.build("llava")
    monkeypatch.setattr(type(model.config), "model_type", "llava_of_tomorrow")
    with pytest.raises(UnsupportedModel, match="llava_of_tomorrow") as caught:
        tile_shares(model, processor, (56, 56), [])
    assert "sequence" in caught.value.advice


# ---- ratios ----


def test_region_sums_by_hand():
    parts = torch.tensor([[1.0, 0.5, 0.0], [0.0, 0.5, 1.0]])
    assert region_sums(torch.tensor([2.0, 4.0, 8.0]), parts) == [4.0, 10.0]


def test_ratios_of_a_collage_and_of_an_inset():
    model, processor = tiny.shared("llava")
    regions = Regions(model, processor)
    layout = grid_layout(4, (112, 112), 28)
    picture = draw_grid([Image.new("RGB", (112, 112), "red")] * 4, layout, labels=False)
    record = {"format": "grid", "n_images": 4, "tiles": [list(box) for box in layout.boxes]}
    prompt = Prompted(record, (picture,), "")
    uniform = {"images": [1.0], "keys": [16], "maps": [[1 / 16] * 16]}
    found = regions.ratios(prompt, uniform)
    assert sum(found) == pytest.approx(1)
    assert found == pytest.approx([0.25] * 4, abs=0.05)
    record = {"format": "pip", "n_images": 2, "tiles": [[0, 0, 112, 112], [28, 28, 84, 84]]}
    prompt = Prompted(record, (Image.new("RGB", (112, 112)),), "")
    assert regions.ratios(prompt, uniform) == pytest.approx([0.75, 0.25], abs=0.02)
    centre = {**uniform, "maps": [[float(i in (5, 6, 9, 10)) for i in range(16)]]}
    assert regions.ratios(prompt, centre) == pytest.approx([0.0, 1.0], abs=0.05)


def test_ratios_by_the_authors_rules():
    model, processor = tiny.shared("llava")
    regions = Regions(model, processor)
    grid = torch.rand(24, 24, dtype=torch.float64)
    record = {"format": "grid", "n_images": 6, "tiles": [[0, 0, 1, 1]] * 6}
    measured = {"images": [1.0], "keys": [576], "maps": [grid.flatten().tolist()]}
    prompt = Prompted(record, (Image.new("RGB", (56, 56)),), "")
    total = float(grid.sum())
    expected = [float(b.sum()) / total for band in grid.split(12) for b in band.split(8, dim=1)]
    assert regions.ratios(prompt, measured, parity=True) == pytest.approx(expected)
    prompt = Prompted({**record, "format": "pip", "n_images": 2}, prompt.pictures, "")
    inner = float(grid[4:20, 4:20].sum()) / total
    assert regions.ratios(prompt, measured, parity=True) == pytest.approx([1 - inner, inner])
    with pytest.raises(UnsupportedModel, match="square grid"):
        regions.ratios(prompt, {**measured, "maps": [[1.0] * 570]}, parity=True)


def test_a_picture_that_became_several_images_is_refused():
    model, processor = tiny.shared("llava")
    prompt = Prompted({"format": "sequence", "n_images": 2}, (Image.new("RGB", (9, 9)),) * 2, "")
    with pytest.raises(UnsupportedModel, match="as 3 images"):
        Regions(model, processor).ratios(prompt, {"images": [1.0] * 3, "keys": [4] * 3})


def features(model, processor, picture):
    """Image features in the order of the sequence: [tokens, D]."""
    inputs = prepare(processor, [[message("user", "a", 1)]], [[picture]])
    composite = mmlm.Anatomy(model).composite
    names = inspect.signature(composite.get_image_features).parameters
    wanted = {k: v for k, v in inputs.items() if k in names}
    with torch.inference_mode():
        pooled = composite.get_image_features(**wanted, return_dict=True).pooler_output
    parts = pooled if not isinstance(pooled, torch.Tensor) else [pooled]
    return torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
