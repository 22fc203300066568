"""Heads as a parameter: layer by layer, in pairs, as a map's file; the same for every method."""

from __future__ import annotations

import copy
import dataclasses
import pickle

import pytest
import tiny
import torch

import mmlm
from mmlm import attach, parse_method
from mmlm.engine.head_maps import HeadMap
from mmlm.engine.selections import read_heads

PAIRS = ((2, 3), (1, 5), (1, 0))
HEADS = ((1, (0, 5)), (2, (3,)))
#: Every method with a parameter for heads, and that parameter.
TAKES = {
    "ACT": "heads_by_layer",
    "HeadAblation": "heads_by_layer",
    "PH3": "heads_by_layer",
    "SeeingKnowing": "image_heads",
    "VHR": "heads_by_layer",
    "ZeroTuning": "heads_by_layer",
}


def saved(folder, heads=PAIRS, shape=(4, 8), threshold=0.1):
    score = torch.zeros(shape, dtype=torch.float64)
    for layer, head in heads:
        score[layer, head] = 0.5
    path = folder / "heads.json"
    HeadMap(
        kind="visual",
        values={"hit_rate": score},
        rank="hit_rate",
        threshold=threshold,
        counted={"steps": 99},
    ).save(path)
    return str(path)


@pytest.mark.parametrize(
    "given", [HEADS, PAIRS, [[2, 3], [1, 5], [1, 0]], {2: [3], 1: [5, 0]}, HEADS[::-1]]
)
def test_every_form_is_the_same(given):
    assert read_heads("X", "heads", given) == HEADS


@pytest.mark.parametrize("given", [((1, 2), (1, 2)), ((1, 2), (3, (4,))), ((1, 2.5),), ((1, -2),)])
def test_pairs_are_checked(given):
    with pytest.raises(ValueError, match=r"X: (heads|layers and heads) must"):
        read_heads("X", "heads", given)


def test_every_method_with_heads_is_here():
    found = {
        name
        for name in mmlm.method_names()
        for field in dataclasses.fields(getattr(mmlm, name))
        if "HeadSet" in str(field.type)
    }
    assert found - {"StreamingHeads"} == set(TAKES)  # there they are those that lose their sight


@pytest.mark.parametrize("name", TAKES)
def test_every_method_takes_a_file_and_pairs(name, tmp_path):
    path, cls = saved(tmp_path), getattr(mmlm, name)
    method = parse_method(f"{name}({TAKES[name]}={path!r})")
    assert method == cls(**{TAKES[name]: HEADS}) == cls(**{TAKES[name]: PAIRS})
    assert parse_method(method.text) == method
    assert pickle.loads(pickle.dumps(method)) == copy.deepcopy(method) == method
    model, processor = tiny.shared("llava")
    inputs = tiny.inputs(processor, ["is there a dog ?"], [[tiny.picture(3)]])
    with torch.no_grad():
        with attach(model, method):
            found = model(**inputs).logits
        with attach(model, cls(**{TAKES[name]: HEADS})):
            assert torch.equal(model(**inputs).logits, found)


@pytest.mark.parametrize("name", TAKES)
def test_error_a_file_for_another_model(name, tmp_path):
    path = saved(tmp_path, heads=((0, 1),), shape=(2, 4))
    method = getattr(mmlm, name)(**{TAKES[name]: path})
    changed = dataclasses.replace(method)  # as commands do with what was parsed
    model, _ = tiny.shared("llava")
    for one in (method, changed):
        with (
            pytest.raises(
                ValueError, match=f"{name}: .* is for 2 layers of 4 heads; the model has 4 of 8"
            ),
            attach(model, one),
        ):
            pass


def test_error_a_file_that_is_missing_or_names_no_head(tmp_path):
    with pytest.raises(ValueError, match=r"VHR: there is no file 'absent\.json'"):
        mmlm.VHR(heads_by_layer="absent.json")
    path = saved(tmp_path, threshold=0.9)
    with pytest.raises(ValueError, match=r"no head is above the threshold 0\.9"):
        mmlm.VHR(heads_by_layer=path)
    with pytest.raises(ValueError, match="goes to heads_files"):
        mmlm.StreamingHeads(heads_by_layer=path)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        (((1, (8,)),), "layer 1 has heads 0 to 7, got 8"),
        (((4, (0,)),), "layer 4 does not exist; the model has layers 0 to 3"),
    ],
)
def test_error_heads_that_are_not_there(heads, message):
    model, _ = tiny.shared("llava")
    for name, parameter in TAKES.items():
        method = getattr(mmlm, name)(**{parameter: heads})
        with pytest.raises(ValueError, match=f"{name}: {message}"), attach(model, method):
            pass
