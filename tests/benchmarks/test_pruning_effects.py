"""The tables of model-side methods in docs/effects.md say what the stored records say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from mmlm.cli.configs import effect_settings

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tools(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "tools"))


@pytest.mark.parametrize(
    ("tool", "begin", "end"),
    [
        ("pruning_page", "<!-- pruning: effects -->", "<!-- pruning end -->"),
        ("swapmix_page", "<!-- swapmix: types -->", "<!-- swapmix end -->"),
        ("model_side_page", "<!-- model side: dara -->", "<!-- model side end -->"),
    ],
)
def test_the_page_is_that_of_the_stored_records(tool, begin, end, tmp_path):
    check = [sys.executable, f"tools/{tool}.py", "--check"]
    assert subprocess.run(check, cwd=ROOT, check=False).returncode == 0
    page = tmp_path / "page.md"
    page.write_text(f"a\n{begin}\nold\n{end}\nb\n")
    other = [*check, "--document", str(page)]
    assert subprocess.run(other, cwd=ROOT, check=False).returncode == 1


def test_every_table_of_trained_methods_stands_in_the_page(tools):
    from model_side_page import DOCUMENT, MARKED, TABLES

    assert [m[2] for m in MARKED.finditer(DOCUMENT.read_text())] == list(TABLES)


def test_three_methods_at_three_budgets(tools):
    import measure_pruning

    known = effect_settings("pruning")
    assert list(known) == ["FlowCut", "ClsPruner", "RandomPruner"]
    methods = [s.methods for s in measure_pruning.settings()]
    assert methods[0] == ()
    assert sorted(m[0].budget for m in methods[1:]) == [11] * 3 + [25] * 3 + [50] * 3


def test_what_the_count_alone_does_to_dominance(tools):
    """MDI with half of the visual tokens and the same attention would be half as large."""
    import pruning_page
    from effects_page import Effect
    from measure_pruning import settings

    found = []
    for setting, tokens, mdi in zip(settings()[:2], (100, 50), (2.0, 1.5), strict=True):
        columns = {"with_image": [1.0, 1.0], "image_tokens": [tokens] * 2}
        for stage in ("early", "middle", "late"):
            for kind in ("mdi", "aei_text", "aei_image"):
                columns |= {f"{stage}.{kind}": [mdi] * 2, f"{stage}.{kind}.n": [1.0] * 2}
            columns |= {
                f"{stage}.attention_text": [0.2] * 2,
                f"{stage}.attention_image": [0.5] * 2,
                f"{stage}.layers": [1.0] * 2,
            }
        columns |= {"text_tokens": [30.0] * 2}
        record = {"dominance": {"images": ["a", "b"], "columns": columns}}
        found.append(Effect(setting, json.loads(json.dumps(record))))
    last = pruning_page.dominance(found).strip().splitlines()[-1].split(" | ")
    assert last[1:6] == ["50", "1.50", "1.50", "1.50", "1.00"]
    assert last[-1].startswith("rebalanced")
