"""The overhead program: what it pairs, stores and says. No test here looks at a time."""

from __future__ import annotations

import json

import pytest

import mmlm
from benchmarks import probe_overhead
from benchmarks.speed_model import Shape

SHAPE = Shape(layers=8, width=64, heads=4, intermediate=64, tower=(2, 32, 1), side=28)


def test_probes_look_at_six_layers_and_change_nothing():
    for text in probe_overhead.probes(32):
        probe = mmlm.parse_method(text)
        assert probe.layers == (0, 1, 15, 16, 30, 31)
        assert probe.sites <= probe.only_looks
        assert probe.rows == "last"


def test_ratios_are_taken_within_a_round(monkeypatch):
    # The machine gets slower by the round; the probe takes a tenth more in each.
    clock = iter([1.0, 1.0, 1.0, 1.1, 2.2, 2.0, 4.0, 4.4])
    order = []

    def timed(run, task, tokens):
        order.append((run, tokens))
        return {"token": next(clock)}

    monkeypatch.setattr(probe_overhead, "timed", timed)
    found = probe_overhead.overhead({"plain": "p", "probe": "q"}, None, 9, 3)
    assert order == [("q", 3), ("p", 3), ("p", 9), ("q", 9), ("q", 9), ("p", 9), ("p", 9), ("q", 9)]
    assert found["probe"]["ratio"] == pytest.approx(1.1)
    assert found["probe"]["interval"] == pytest.approx([1.1, 1.1])
    assert (found["probe"]["plain_seconds"], found["probe"]["seconds"]) == (2.0, 2.2)
    assert set(found) == {"probe"}


def test_an_interval_holds_the_median():
    low, high = probe_overhead.interval([1.0, 1.01, 1.02, 1.2, 0.9])
    assert 0.9 <= low <= 1.01 <= high <= 1.2


def test_a_run_is_stored(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(probe_overhead.PRESETS, "small", SHAPE)
    path = tmp_path / "overhead.json"
    given = ["--preset", "small", "--tokens", "3", "--rounds", "2", "--output", str(path)]
    assert probe_overhead.main(given) == 0
    stored = json.loads(path.read_text())
    assert set(stored["results"]) == set(probe_overhead.probes(8))
    assert stored["limit"] == 0.03
    assert stored["setting"]["rounds"] == 2
    assert capsys.readouterr().out.count("of plain decoding") == 4
