"""Maps of heads as figures: of records of probes, of files of heads."""

from __future__ import annotations

import math

import numpy as np
import pytest
import tiny
import torch

import mmlm
from mmlm.engine.head_maps import HeadMap
from mmlm.show.head_figures import MAPS, draw_map, draw_records


def drawn_maps(figure):
    return [axes.images[0].get_array() for axes in figure.axes if axes.images]


@pytest.mark.parametrize(
    ("probe", "measures"),
    [
        ("AttentionSinks()", "attention_sinks"),
        ("VisualHeads()", "visual_heads"),
        ("HeadDivergence()", "head_divergence"),
        ("QueryNorms()", "query_norms"),
    ],
)
def test_a_record_has_a_figure(probe, measures):
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, ["is there a dog ?"], [[tiny.picture(3)]])
    with mmlm.attach(model, mmlm.parse_method(probe)):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        (row,) = mmlm.measured(model)
    record = row[measures]
    figure = draw_records({"one": record, "other": None}, measures)
    (found,) = drawn_maps(figure)
    np.testing.assert_allclose(found, record[MAPS[measures][0]])
    assert [a.get_title() for a in figure.axes if a.images] == ["one"]
    assert figure.axes[-1].get_ylabel() == MAPS[measures][1]


def test_nothing_measured_is_no_figure():
    for record in (None, {"layers": [0], "looks": None}, {"layers": [0]}):
        assert draw_records({"one": record}, "visual_heads") is None


def test_a_map_is_drawn_whole_by_any_of_its_values():
    score = torch.tensor([[0.1, 0.9, 0.3]], dtype=torch.float64)
    other = torch.tensor([[math.nan, -0.5, 2.0]], dtype=torch.float64)
    found = HeadMap(kind="visual", values={"hit_rate": score, "focus": other}, rank="hit_rate")
    assert drawn_maps(draw_map(found))[0].tolist() == score.tolist()
    assert drawn_maps(draw_map(found, "focus"))[0].tolist() == [[0.0, 0.0, 2.0]]
