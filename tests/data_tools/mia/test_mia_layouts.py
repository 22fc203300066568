"""Where pictures go when several become one."""

import json

import numpy as np
import pytest
from golden import arrays, golden
from PIL import Image, ImageFont, features

from data_tools.mia import layouts
from data_tools.mia.layouts import draw_grid, draw_inset, fitted, grid, inset, label_font


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("mia_dpo*/layout.json"))
def test_acceptance_1_layout_boxes(path):

    vectors = json.loads(path.read_text())
    assert vectors["grid"]
    assert vectors["pic_in_pic"]
    for name, case in vectors["grid"].items():
        layout = grid(case["n_images"], tuple(case["target_size"]), case["margin"])
        assert list(layout.size) == case["output_size"], name
        assert [list(corner) for corner in layout.corners] == case["cell_xy"], name
        assert [[text, list(at)] for text, at in layout.labels] == case["labels"], name
        sizes = [fitted(tuple(size), layout.tile) for size in case["input_sizes"]]
        assert [list(size) for size in sizes] == case["resized_sizes"], name
    for name, case in vectors["pic_in_pic"].items():
        place = inset(tuple(case["inner_size"]), tuple(case["outer_size"]))
        assert list(place.size) == case["resized"], name
        assert list(place.corner) == case["paste_xy"], name


@pytest.mark.golden
@pytest.mark.parametrize("path", golden("mia_dpo*/layout_pixels.npz"))
def test_acceptance_1_layout_pixels(path):

    vectors = json.loads(path.with_name("layout.json").read_text())
    pixels = {name: value.numpy() for name, value in arrays(path).items()}
    drawn = {}
    for name, case in vectors["grid"].items():
        if name not in pixels:  # the large canvases come as boxes only
            continue
        layout = grid(case["n_images"], tuple(case["target_size"]), case["margin"])
        # The inputs were of one colour each, which the upper left pixel of the tile still has.
        colours = [tuple(map(int, pixels[name][y, x])) for x, y in layout.corners]
        sizes = zip(case["input_sizes"], colours, strict=True)
        pictures = [Image.new("RGB", tuple(size), colour) for size, colour in sizes]
        drawn[name] = draw_grid(pictures, layout, labels=False)
    for name in vectors["pic_in_pic"]:
        inner, outer = (Image.fromarray(pixels[f"{name}_{part}"]) for part in ("inner", "outer"))
        drawn[f"{name}_out"] = draw_inset(inner, outer, inset(inner.size, outer.size))
    assert len(drawn) > len(vectors["pic_in_pic"])
    for name, image in drawn.items():
        difference = np.asarray(image).astype(int) - pixels[name]
        assert np.abs(difference).max() <= 1, name


@pytest.mark.parametrize(
    ("n_images", "size"),
    [(2, (936, 488)), (3, (1424, 488)), (4, (936, 976)), (6, (1424, 976)), (9, (1424, 1464))],
)
def test_sizes_of_the_paper(n_images, size):
    layout = grid(n_images)
    assert layout.size == size
    assert len(layout.boxes) == n_images
    x, y = layout.corners[-1]
    assert layout.boxes[-1] == (x, y, *size)  # the last tile ends at the canvas's corner
    # Row by row, 488 pixels apart, a band of 40 above each.
    assert layout.corners[0] == (0, 40)
    assert layout.corners[1] == (488, 40)


def test_a_number_without_a_grid():
    with pytest.raises(ValueError, match="2, 3, 4, 6, 9 pictures, got 5"):
        grid(5)


def test_tiles_do_not_overlap_and_hold_their_pictures():
    layout = grid(9, (50, 40), 7)
    canvas = np.zeros(layout.size[::-1], dtype=int)
    for x0, y0, x1, y1 in layout.boxes:
        assert (x1 - x0, y1 - y0) == (50, 40)
        canvas[y0:y1, x0:x1] += 1
    assert canvas.max() == 1
    assert canvas.sum() == 9 * 50 * 40


def test_pictures_stand_at_the_upper_left_on_white():
    red, blue = Image.new("RGB", (100, 50), "red"), Image.new("RGB", (50, 100), "blue")
    pixels = np.asarray(draw_grid([red, blue], grid(2, (40, 40), 10), labels=False))
    assert pixels.shape == (50, 90, 3)
    assert (pixels[:10] == 255).all()  # the band of the labels
    assert (pixels[10:30, :40] == (255, 0, 0)).all()
    assert (pixels[30:, :40] == 255).all()  # below a wide picture
    assert (pixels[:, 40:50] == 255).all()
    assert (pixels[10:, 50:70] == (0, 0, 255)).all()
    assert (pixels[:, 70:] == 255).all()  # to the right of a high one


def test_labels_are_drawn_in_their_band_and_only_there():
    pictures = [Image.new("RGB", (448, 448), "yellow")] * 2
    bare, labelled = (
        np.asarray(draw_grid(pictures, grid(2), labels=labels)).astype(int)
        for labels in (False, True)
    )
    changed = np.abs(bare - labelled).max(axis=2) > 0
    rows, columns = np.nonzero(changed)
    assert rows.max() < layouts.MARGIN + 8  # a "g" may reach below its line
    assert columns[columns < 448].min() >= 20  # left border of a letter
    assert (columns >= 488 + 20).any()


def test_no_font_file_is_needed(monkeypatch):
    assert label_font(36).size == 36
    # A Pillow without FreeType has one font only: small, but a label all the same.
    monkeypatch.setattr(features, "check", lambda name: False)
    label_font.cache_clear()
    try:
        assert isinstance(label_font(36), ImageFont.ImageFont)
        pictures = [Image.new("RGB", (448, 448), "yellow")] * 2
        assert np.asarray(draw_grid(pictures, grid(2)))[:40].min() < 128
    finally:
        label_font.cache_clear()


def test_as_many_pictures_as_tiles():
    with pytest.raises(ValueError):
        draw_grid([Image.new("RGB", (9, 9))] * 3, grid(2))


@pytest.mark.parametrize(
    ("inner", "outer", "size", "corner"),
    [
        ((100, 100), (100, 100), (70, 70), (15, 15)),
        ((200, 100), (100, 100), (70, 35), (15, 32)),  # (100 - 35) // 2 = 32
        ((100, 200), (100, 100), (35, 70), (32, 15)),
        ((1, 1), (33, 21), (14, 14), (9, 3)),  # int(0.7 * 21) = 14
    ],
)
def test_inset_by_hand(inner, outer, size, corner):
    place = inset(inner, outer)
    assert (place.size, place.corner) == (size, corner)
    assert place.box == (*corner, corner[0] + size[0], corner[1] + size[1])


def test_inset_leaves_the_outer_picture_alone():
    outer = Image.new("RGB", (60, 60), "white")
    drawn = np.asarray(draw_inset(Image.new("L", (9, 9), 0), outer, inset((9, 9), outer.size)))
    assert np.asarray(outer).min() == 255
    assert (drawn[9:51, 9:51] == 0).all()
    assert (drawn[:9] == 255).all()
    assert (drawn[51:] == 255).all()


def test_a_tile_that_is_not_square():
    # Wider than high, but less so than the tile: its height fills it.
    assert fitted((110, 100), (56, 48)) == (52, 48)  # int(48 * 1.1)
    assert fitted((100, 100), (40, 48)) == (40, 40)


def test_extreme_proportions_keep_a_pixel():
    assert fitted((3000, 1), (448, 448)) == (448, 1)
    assert fitted((1, 3000), (448, 448)) == (1, 448)
