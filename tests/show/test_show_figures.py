"""Figures: cells where they belong, brightness in order, refusals."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from mmlm.errors import InputError
from mmlm.show import figures


def test_a_map_lies_over_its_picture():
    picture = Image.new("RGB", (40, 20), (90, 90, 90))
    values = np.zeros((2, 4))
    values[1, 3] = 0.5
    values[0, 0] = 0.25
    shown = np.asarray(figures.overlay(picture, values, side=80), float)
    assert shown.shape == (40, 80, 3)
    brightest, some, none = shown[30, 70], shown[5, 5], shown[5, 70]
    assert brightest[0] > 200  # viridis ends in yellow
    assert brightest[2] < 90
    # Grey where nothing was looked at, and the more colour the more attention.
    assert 0 == np.ptp(none) < np.ptp(some) < np.ptp(brightest)
    assert (shown[20:, 60:] == brightest).all()  # a cell stays a cell


def test_one_peak_makes_maps_comparable():
    picture = Image.new("RGB", (8, 8), "white")
    weak = figures.overlay(picture, np.full((1, 1), 0.1), peak=1.0)
    strong = figures.overlay(picture, np.full((1, 1), 1.0), peak=1.0)
    alone = figures.overlay(picture, np.full((1, 1), 0.1))
    assert np.array_equal(np.asarray(strong), np.asarray(alone))
    assert not np.array_equal(np.asarray(weak), np.asarray(strong))


def test_nothing_anywhere_is_the_grey_picture():
    shown = np.asarray(figures.overlay(Image.new("RGB", (8, 8), "red"), np.zeros((2, 2))))
    assert np.ptp(shown.astype(int), axis=-1).max() == 0


@pytest.mark.parametrize("wrong", [np.ones(4), np.ones((0, 2)), -np.ones((2, 2)), [[np.nan]]])
def test_what_is_no_map_is_refused(wrong):
    with pytest.raises(InputError, match="cannot be laid over a picture"):
        figures.overlay(Image.new("RGB", (8, 8)), np.asarray(wrong))


def test_words_of_any_script_and_signs_are_drawn_as_they_are(tmp_path):
    tile = figures.Tile("狗 $x$ \\frac", Image.new("RGB", (30, 90)), "5 %")
    figures.save(figures.sheet({"模型 $y": [tile, figures.Tile("", None)]}), tmp_path / "a.svg")
    text = (tmp_path / "a.svg").read_text()
    assert "狗 $x$ \\frac" in text
    figures.save(figures.sheet({"a": [tile]}), tmp_path / "a.png")
    with Image.open(tmp_path / "a.png") as drawn:
        assert drawn.height > drawn.width  # as tall as the picture is


def test_curves_with_gaps_and_one_value_are_drawn(tmp_path):
    panels = [
        figures.Panel("a", "share", {"one": {0: 0.1, 1: None, 2: 0.3}, "two": {0: 0.0}}),
        figures.Panel("b", "MDI", {"one": {0: 0.01, 1: 100.0}}, even=1.0, logarithmic=True),
        figures.Panel("c", "share", {"one": {0: 0.0}}),
    ]
    drawn = figures.layers(panels)
    assert [axes.get_yscale() for axes in drawn.axes] == ["linear", "log", "linear"]
    figures.save(drawn, tmp_path / "a.png")


def test_maps_of_heads_have_one_scale():
    maps = {"before": np.full((30, 4), 0.2), "after": np.full((30, 4), 0.8)}
    drawn = figures.heads(maps, range(30), "divergence")
    limits = {axes.images[0].get_clim() for axes in drawn.axes if axes.images}
    assert limits == {(0, 0.8)}
    assert len(drawn.axes[0].get_yticks()) <= 16


def test_long_notes_go_on_in_another_line_and_get_room_for_it():
    image = Image.new("RGB", (40, 40))
    note = "1 token; the strongest in 1 of 48 heads; 0% of them stand out in the states"
    short, long = (
        figures.sheet({"a": [figures.Tile("sinks", image, text)]}) for text in ("1 token", note)
    )
    (axes,) = long.subfigs[0].axes
    lines = axes.get_xlabel().splitlines()
    assert " ".join(lines) == note
    assert max(map(len, lines)) <= 28
    assert long.get_figheight() > short.get_figheight()
