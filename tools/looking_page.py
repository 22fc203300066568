"""Writes the table of docs/inspect.md from what measure_looking.py measured.

python tools/looking_page.py            rewrite the table
python tools/looking_page.py --check    exit code 1 if the page is not up to date

The text around the table is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import numpy as np
from embedded_tables import MARKED, ROOT, table
from measure_looking import ARMS, RECORD, numbers

DOCUMENT = ROOT / "docs" / "inspect.md"
HEAD = (
    "method",
    "objects found",
    "invented",
    "attention on the picture: found",
    "invented",
    "within the object's outline",
    "its part of the picture",
)


def main() -> None:
    """Rewrites or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    before = DOCUMENT.read_text(encoding="utf-8")
    lines = written(json.loads(RECORD.read_text(encoding="utf-8")))
    after = MARKED.sub(lambda m: f"{m[1]}{lines}{m[3]}" if m[2] == "looking" else m[0], before)
    if not check:
        DOCUMENT.write_text(after, encoding="utf-8")
    elif after != before:
        sys.exit("docs/inspect.md is not up to date: python tools/looking_page.py")


def written(record: dict[str, Any]) -> str:
    """The table, from the counts of every picture."""
    rows = []
    for arm in ARMS:
        found = numbers(np.asarray(record[arm]["rows"]))
        shares = ("attention_found", "attention_invented", "within_outline", "outline_area")
        mentions = found["mentions"]
        name = "plain" if arm == "none" else f"`{arm}`"
        counts = (str(mentions["found"]), str(mentions["invented"]))
        rows.append((name, *counts, *(_percent(found[share]) for share in shares)))
    return table(HEAD, rows)


def _percent(measure: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in measure["interval"])
    return f"{100 * measure['value']:.1f} [{low:.1f}, {high:.1f}]"


if __name__ == "__main__":
    main()
