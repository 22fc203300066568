"""docs/effects.md on visual heads: what is measured, and that its tables are what is stored."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import mmlm
from benchmarks.base import CountTable
from mmlm.engine.head_maps import HeadMap
from mmlm.inputs import message, prepare

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tools():
    sys.path.insert(0, str(ROOT / "tools"))
    import heads_page
    import measure_embedded
    import measure_heads
    import text_control

    yield SimpleNamespace(
        page=heads_page,
        measure=measure_heads,
        control=text_control,
        embedded=measure_embedded,
    )
    sys.path.remove(str(ROOT / "tools"))


def test_the_tables_are_those_of_the_stored_records():
    check = [sys.executable, "tools/heads_page.py", "--check"]
    assert subprocess.run(check, cwd=ROOT).returncode == 0, "run: tools/heads_page.py"


def _by_layer(heads):
    return dict(Counter(layer for layer, _ in heads))


def test_controls_have_as_many_other_heads_of_the_same_layers(tools):
    found = HeadMap.load(tools.measure.MAP)
    for arm in (*tools.measure.ablated(), *tools.measure.streamed()):
        drawn = tools.measure.draws(found, arm.heads, tools.measure.DRAWS)
        assert all(_by_layer(heads) == _by_layer(arm.heads) for heads in drawn)
        assert not any(set(heads) & set(arm.heads) for heads in drawn)
        paths = {c.path for c in (arm.chosen, *arm.controls)}
        assert len(paths) == 1 + len(arm.controls)


def test_ablation_takes_the_strongest_heads_and_streaming_all_others(tools):
    found = HeadMap.load(tools.measure.MAP)
    for arm in tools.measure.ablated():
        (method,) = arm.chosen.methods
        ablated = {(layer, head) for layer, own in method.ablated for head in own}
        assert ablated == set(arm.heads) == set(found.top(len(arm.heads)))
        assert len(arm.controls) == tools.measure.DRAWS
    for arm in tools.measure.streamed():
        (method,) = arm.chosen.methods
        streaming = {(layer, head) for layer, own in method.streaming for head in own}
        assert len(streaming) == 48 - len(arm.heads)
        assert not streaming & set(arm.heads)


def test_the_text_control_reads_all_words_but_those_of_objects(tools, monkeypatch):
    """Two captions of different lengths in one batch, against each of them alone."""
    written = {
        0: "a kitchen with a dining table and two people . a dog is to the left of the table .",
        1: "a street with a traffic light .",
        2: "a beach with two surfboards .",
    }
    objects = {"table", "people", "dog", "traffic", "light", "surfboards"}
    monkeypatch.setattr(tools.control, "true_caption", lambda scene: written[scene.index])
    model, processor = mmlm.load("embedded")
    scenes = tools.embedded.Pictures("natural", 3).scenes()
    found = tools.control.text_control(model, processor, scenes, batch_size=2)
    for row, scene in enumerate(scenes):
        text = written[scene.index]
        question = [message("user", tools.embedded.QUESTION, 1)]
        picture = tools.embedded.picture(scene)
        inputs = prepare(processor, [question], [[picture]], begun=[f" {text}"])
        ids = inputs["input_ids"][0, -len(text.split()) :]
        with torch.inference_mode():
            likely = model(**inputs).logits[0, -len(ids) - 1 : -1].double().log_softmax(-1)
        kept = [i for i, word in enumerate(text.split()) if word not in objects]
        assert found.counts[row].tolist() == pytest.approx(
            [len(kept), sum(float(likely[i, ids[i]]) for i in kept)], abs=1e-4
        )
    value = found.measure("log_probability").value
    assert value == pytest.approx(found.counts[:, 1].sum() / found.counts[:, 0].sum())


def test_the_text_control_sees_what_is_attached(tools):
    model, processor = mmlm.load("embedded")
    scenes = tools.embedded.Pictures("natural", 2).scenes()
    everything = tuple((layer, tuple(range(6))) for layer in range(8))
    method = mmlm.HeadAblation(kind="blind", heads_by_layer=everything)
    plain, blind = (
        tools.control.text_control(model, processor, scenes, methods).measure("log_probability")
        for methods in ((), (method,))
    )
    assert blind.value < plain.value < 0


def test_areas_under_the_curve_are_shares_of_pairs_that_are_won(tools):
    rng = np.random.default_rng(0)
    picture, true = rng.integers(0, 5, 40), rng.random(40) < 0.6
    values = rng.integers(0, 6, (40, 3)).astype(float)
    wins = tools.page.Wins.of(picture, true, values)
    n = len(np.unique(picture))

    def naive(weights):
        won = pairs = 0.0
        for i in np.flatnonzero(true):
            for j in np.flatnonzero(~true):
                weight = weights[picture[i]] * weights[picture[j]]
                for draw in range(3):
                    won += weight / 3 * ((a := values[i, draw]) > (b := values[j, draw]))
                    won += weight / 3 * 0.5 * (a == b)
                pairs += weight
        return won / pairs

    for weights in (np.ones(n), np.array([2.0, 0, 1, 1, 1])[:n]):
        assert wins.auc(weights[None])[0] == pytest.approx(naive(weights))


def test_pooled_runs_are_means_of_counts(tools):
    def columns(counts):
        return [tools.page.Column("n", CountTable(("n",), ("a", "b"), np.array(counts), {}), "n")]

    (mean,) = tools.page.pooled([columns([[1.0], [3.0]]), columns([[2.0], [5.0]])])
    assert mean.counts.counts.tolist() == [[1.5], [4.0]]
