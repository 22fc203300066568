"""What docs/effects.md says about pruned heads is what was measured, with a guard on the text."""

import re
import subprocess
import sys
from pathlib import Path

import mmlm
from mmlm.cli.configs import effect_label, effect_settings

ROOT = Path(__file__).parents[2]


def test_ph3_acceptance_10_length_repetition_and_recall_stand_beside_chair():
    check = [sys.executable, "tools/measure_ph3.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0
    page = (ROOT / "docs" / "effects.md").read_text(encoding="utf-8")
    table = re.search(r"<!-- ph3: effects -->\n(.*?)<!-- ph3 end -->", page, re.S)[1]
    head, _, plain, *rows = (
        [c.strip() for c in row.split("|")[1:-1]] for row in table.splitlines()
    )
    assert {"CHAIR_s", "CHAIR_i", "recall", "words", "duplicate sentences"} <= set(head)
    assert len(rows) == 6
    for row in rows:
        changes = row[head.index("CHAIR_s") : head.index("POPE random")]
        assert all(re.fullmatch(r"\**(0\.0|[+-]\d+\.\d) \[.*, .*\]\**", cell) for cell in changes)
    assert all(re.fullmatch(r"\d+\.\d", cell) for cell in plain[2:10])


def test_both_directions_are_measured_with_heads_that_ship():
    methods = [mmlm.parse_method(text) for text in effect_settings("ph3")["PH3"]]
    for towards in ("image", "memory"):
        counts = [sum(len(h) for _, h in m.pruned) for m in methods if m.towards == towards]
        assert len(set(counts)) == 3  # three fractions, three numbers of heads
    heads = {m.pruned for m in methods}
    assert len(heads) == 6
    # Those of the first direction are those of the page's other tables.
    assert set(effect_settings("embedded")["PH3"]) < set(effect_settings("ph3")["PH3"])


def test_labels_leave_lists_of_heads_out():
    text = effect_settings("embedded")["SeeingKnowing"][0]
    assert effect_label(text) == "SeeingKnowing(image_change=1.0, memory_change=-1.0)"
