"""Code in README and docs runs as written; the tutorial's methods keep the contract."""

import contextlib
import io
import re
from pathlib import Path

import checks
import pytest
import tiny

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.M | re.S)


def blocks(page):
    return BLOCK.findall(page.read_text(encoding="utf-8"))


def run(page):
    """Runs a page's Python blocks one after the other; returns its names."""
    space, printed, before = {"__name__": "page"}, "", ""
    for kind, code in blocks(page):
        if kind == "python":
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                exec(compile(code, str(page), "exec"), space)
            printed = out.getvalue()
        elif kind == "output" and before == "python":  # others: tests/test_get_started.py
            assert printed == code
        before = kind
    return space


@pytest.mark.parametrize(
    "page", [p for p in PAGES if any(k == "python" for k, _ in blocks(p))], ids=lambda p: p.name
)
def test_python_blocks_run_and_print_what_the_page_says(page, monkeypatch):
    monkeypatch.chdir(ROOT)
    run(page)


def test_local_links_lead_somewhere():
    broken = [
        f"{page.name}: {target}"
        for page in PAGES
        for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text(encoding="utf-8"))
        if not (page.parent / target).exists()
    ]
    assert not broken


@pytest.mark.parametrize("name", ["ImagePush", "LouderHeads"])
@pytest.mark.parametrize(
    "check",
    [
        checks.neutral_is_plain,
        checks.changes_logits,
        checks.leaves_no_trace,
        checks.batch_equals_single_rows,
        checks.cache_paths_agree,
        checks.image_free_row_is_unchanged,
    ],
    ids=lambda c: c.__name__,
)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_the_tutorials_methods_keep_the_contract(name, check, family, tutorial):
    tiny.shared(family)
    check(tutorial[name](), family)


@pytest.fixture(scope="module")
def tutorial():
    page = ROOT / "docs" / "writing-a-method.md"
    space = {"__name__": "page"}
    for kind, code in blocks(page):
        if kind == "python" and "class " in code:
            exec(compile(code, str(page), "exec"), space)
    return space


def test_generated_pages_equal_the_committed_ones():
    import importlib.util

    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "tools" / "build_docs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name, make in module.PAGES.items():
        assert (ROOT / "docs" / name).read_text(encoding="utf-8") == make(), "run: make docs"


def test_the_papers_page_has_a_setting_and_a_configuration_for_every_method():
    import mmlm
    from mmlm.cli.configs import find_config

    page = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| (\w+) \| `(decode/\w+)` \|", page, re.M))
    assert set(rows) == set(mmlm.method_names())
    for name, config in rows.items():
        assert name in find_config(config).read_text(encoding="utf-8")
