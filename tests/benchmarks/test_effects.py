"""docs/effects.md says what the stored records say, and the comparison behind it is right."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import mmlm
from mmlm.cli.configs import effect_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


def test_the_page_is_that_of_the_stored_records():
    check = [sys.executable, "tools/effects_page.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0


#: They show what heads are for and mitigate nothing, so no setting of theirs is recommended.
EXPERIMENTS = {"HeadAblation", "StreamingHeads"}


def test_every_method_has_a_recommended_setting_and_two_others():
    known = {**effect_settings("embedded"), **effect_settings("pruning")}
    trained = {"MMA", "DyVTE", "CrossLMM", "DARA"}  # measured by tools of their own
    assert set(known) == set(mmlm.method_names()) - trained - EXPERIMENTS
    for name, texts in known.items():
        methods = [mmlm.parse_method(text) for text in texts]
        assert [type(method).__name__ for method in methods] == [name] * 3
        assert len(set(methods)) == 3


def test_recommended_settings_come_first(tools):
    from measure_effects import settings

    *most, last = settings()
    assert [setting.rank for setting in most] == sorted(setting.rank for setting in most)
    assert most[0].methods == last.methods == ()
    assert last.num_beams == 5


def test_a_setting_on_fewer_pictures_is_compared_on_those(tools):
    from effects_page import difference

    from benchmarks.base import CountTable, Ratio

    share = {"share": Ratio(("bad",), ("all",))}
    plain = CountTable(
        ("bad", "all"), (0, 1, 10, 2), np.array([[1, 1], [1, 1], [0, 1], [0, 1]]), share
    )
    other = CountTable(("bad", "all"), (0, 10), np.array([[0, 1], [0, 1]]), share)
    assert difference(plain, other, "share").value == -0.5  # 0 of 2 against 1 of 2


def test_a_record_is_stored_whole_and_read_back(tools, tmp_path):
    import json

    from measure_effects import store

    path = tmp_path / "a.json"
    store(path, {"images": [1, 2, 3], "text": "[1, 2]", "nested": {"x": [0.5]}})
    assert json.loads(path.read_text())["images"] == [1, 2, 3]
    assert "[1,2,3]" in path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_stored_records_are_of_the_shipped_model_and_of_enough_pictures(tools):
    from effects_page import load

    effects = load()
    assert len({e.record["identity"]["model"] for e in effects}) == 1
    plain = effects[0].record["identity"]
    assert plain["pictures"] >= 300
    for effect in effects:
        fewer = effect.setting.group in ("OPERA", "plain")
        assert effect.record["identity"]["pictures"] >= (100 if fewer else 300)
        assert all(table.sums()["answers"] >= 590 for table in effect.polls.values()) or fewer
