"""The small scripts in examples/ run as they stand and print what examples/outputs/ says."""

import ast
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
#: Too long for this process, or not to be had in it: training sets up processes of its own.
APART = ("preference_pairs", "train_five_steps")
#: Needs a server, which a test of its own starts.
ASKS = ("ask_a_server",)
SCRIPTS = sorted(p.stem for p in EXAMPLES.glob("*.py") if not p.stem.startswith("lmms_eval"))


def expected(name):
    return (EXAMPLES / "outputs" / f"{name}.txt").read_text(encoding="utf-8")


def test_there_are_ten_of_them_and_each_is_small():
    assert len(SCRIPTS) >= 10
    for name in SCRIPTS:
        source = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
        assert sum(bool(line.strip()) for line in source.splitlines()) < 40, name
        said = ast.get_docstring(ast.parse(source))
        assert f"python examples/{name}.py" in said
        assert expected(name)


@pytest.mark.parametrize("name", [name for name in SCRIPTS if name not in (*APART, *ASKS)])
def test_script(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert capsys.readouterr().out == expected(name)


@pytest.mark.slow
def test_pairs_then_a_training_on_them(tmp_path):
    for name in APART:
        done = subprocess.run(
            [sys.executable, str(EXAMPLES / f"{name}.py")],
            cwd=tmp_path, env=os.environ | {"DS_ACCELERATOR": "cpu"},
            capture_output=True, text=True, timeout=500,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert done.stdout.endswith(expected(name))  # libraries speak first
