"""The speed program: what it counts, stores and shows. No test here looks at a time."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import mmlm
from benchmarks import speed
from benchmarks.speed_model import Shape, build_model, build_processor, make_task

ROOT = Path(__file__).parents[2]
SHAPE = Shape(layers=3, width=64, heads=4, intermediate=64, tower=(2, 32, 1), side=28)


@pytest.fixture(scope="module")
def task():
    return make_task(build_model(SHAPE), build_processor(SHAPE), 2, SHAPE.side)


def test_the_page_is_that_of_the_stored_runs():
    check = [sys.executable, "tools/speed_tables.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0


def test_passes_are_counted_for_ours_and_naive(task):
    n = task.inputs["input_ids"].numel()
    counted = {
        name: speed.count_passes(run, task)
        for name, run in speed.variants(task, mmlm.parse_method("VCD")).items()
    }
    assert counted["plain"] == speed.Passes((1, n), (1, 2), 2)
    assert counted["ours"] == speed.Passes((2, 2 * n), (1, 4), 4)  # one pass per token
    assert counted["naive"] == speed.Passes((2, 2 * n), (2, 4), 4)  # one after the other


def test_every_stamp_belongs_to_a_token_and_a_search_is_timed_whole(task):
    calls = []

    def ticking(n, tick):
        calls.append(n)
        for _ in range(n):
            tick()

    def silent(n, tick):
        calls.append(n)

    for run, expected in ((ticking, [3, 5, 5]), (silent, [3, 1, 5, 1, 5, 1])):
        calls.clear()
        rows = speed.measure({"run": run}, task, tokens=5, rounds=2)
        assert calls == expected
        assert rows["run"].keys() == {"prefill", "token", "total"}


def test_a_run_is_stored_continued_and_not_mixed(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(speed.PRESETS, "small", SHAPE)
    path = tmp_path / "speed.json"
    given = ["--batch", "1", "--tokens", "3", "--rounds", "1", "--output", str(path)]
    assert speed.main([*given, "--method", "VHR()"]) == 0
    stored = json.loads(path.read_text())
    rows = stored["results"]["VHR"]["1"]
    assert rows["ours"]["token_passes"] == rows["plain"]["token_passes"] == 1
    assert rows["commit"]
    assert speed.main([*given, "--method", "VHR()", "--method", "M3ID()"]) == 0
    after = json.loads(path.read_text())
    assert after["results"]["VHR"] == stored["results"]["VHR"]
    assert "M3ID" in after["results"]
    assert "M3ID" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="another setting"):
        speed.main([*given[:-2], "--rounds", "2", "--output", str(path)])


def test_settings_cover_every_method_and_labels_stay_short():
    methods = [mmlm.parse_method(text) for text in speed.settings(3)]
    assert {type(method).__name__ for method in methods} == set(mmlm.method_names("decoding"))
    labels = [speed.short(method.label) for method in methods]
    assert len(set(labels)) == len(labels)
    assert max(map(len, labels)) < 30
