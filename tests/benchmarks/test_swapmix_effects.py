"""The tables on SwapMix in docs/effects.md say what the stored records say."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    import swapmix_page

    return swapmix_page


def test_the_page_is_that_of_the_stored_records(tmp_path):
    check = [sys.executable, "tools/swapmix_page.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0
    document = tmp_path / "page.md"
    document.write_text("a\n<!-- swapmix: questions -->\nold\n<!-- swapmix end -->\nb\n")
    other = [*check, "--document", str(document)]
    assert subprocess.run(other, cwd=ROOT, check=False).returncode == 1


def test_every_table_stands_in_the_page(page):
    found = [match[2] for match in page.MARKED.finditer(page.DOCUMENT.read_text())]
    assert found == list(page.TABLES)


def test_columns_of_zeros_are_not_stored_and_count_as_zeros(page):
    from benchmarks.swapmix.counts import RATIOS

    stored = {"images": ["1", "2"], "columns": {"right": [2, 3], "questions": [4, 4]}}
    of = page.counts(stored, {name: RATIOS[name] for name in ("accuracy", "context_reliance")})
    assert of.measure("accuracy").value == 5 / 8
    assert of.measure("context_reliance").value == 0


def test_changes_are_paired_over_the_scenes(page):
    first = {
        "name": "plain",
        "identity": {"setting": "plain"},
        "questions": {"images": ["1", "2"], "columns": {"right": [2, 2], "questions": [4, 4]}},
    }
    more = {"images": ["1", "2"], "columns": {"right": [3, 3], "questions": [4, 4]}}
    second = {"name": "VHR", "identity": {"setting": "VHR(alpha=2.0)"}, "questions": more}
    rows = page.questions([first, second]).splitlines()
    assert rows[2].startswith("| plain | 50.0 [50.0, 50.0] | 0.0")
    assert rows[3].startswith("| `VHR(alpha=2.0)` | **+25.0 [+25.0, +25.0]** | 0.0 [0.0, 0.0] |")
    second["questions"] = {"images": ["2"], "columns": {"right": [4], "questions": [4]}}
    rows = page.questions([first, second]).splitlines()  # measured on fewer scenes
    assert rows[3].startswith("| `VHR(alpha=2.0)` 1 scenes | **+50.0 [+50.0, +50.0]** |")
