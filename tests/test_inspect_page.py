"""The tables of docs/inspect.md say what was measured."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_the_tables_are_up_to_date():
    check = [sys.executable, "tools/looking_page.py", "--check"]
    found = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert found.returncode == 0, found.stderr
