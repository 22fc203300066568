"""Writes the tables of docs/inspect.md from what was measured.

    python tools/looking_page.py            rewrite the tables
    python tools/looking_page.py --check    exit code 1 if the page is not up to date

`looking` is of `tools/measure_looking.py`, `overhead` of `python -m benchmarks.probe_overhead`. The
text around the tables is written by hand.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import numpy as np
from embedded_tables import MARKED, ROOT, page_command, table
from measure_looking import ARMS, RECORD, numbers

DOCUMENT = ROOT / "docs" / "inspect.md"
OVERHEAD = ROOT / "docs" / "results" / "probe_overhead.json"
HEAD = (
    "method",
    "objects found",
    "invented",
    "attention on the picture: found",
    "invented",
    "within the object's outline",
    "its part of the picture",
)


def main() -> int:
    """Rewrites or checks the page."""
    return page_command(__doc__, DOCUMENT, MARKED, TABLES)


def looking() -> str:
    """Where the model looked, from the counts of every picture."""
    record = json.loads(RECORD.read_text(encoding="utf-8"))
    rows = []
    for arm in ARMS:
        found = numbers(np.asarray(record[arm]["rows"]))
        shares = ("attention_found", "attention_invented", "within_outline", "outline_area")
        mentions = found["mentions"]
        name = "plain" if arm == "none" else f"`{arm}`"
        counts = (str(mentions["found"]), str(mentions["invented"]))
        rows.append((name, *counts, *(_percent(found[share]) for share in shares)))
    return table(HEAD, rows)


def overhead() -> str:
    """What each probe adds to the time of a token."""
    record = json.loads(OVERHEAD.read_text(encoding="utf-8"))
    limit = record["limit"]
    rows = []
    for text, one in record["results"].items():
        more = one["ratio"] - 1
        low, high = (100 * (bound - 1) for bound in one["interval"])
        verdict = "met" if more <= limit else "**missed**"
        rows.append((f"`{text}`", f"{100 * more:+.1f} [{low:+.1f}, {high:+.1f}]", verdict))
    return table(("probe", "time of a token, %", f"limit {limit:.0%}"), rows)


def _percent(measure: dict[str, Any]) -> str:
    low, high = (100 * bound for bound in measure["interval"])
    return f"{100 * measure['value']:.1f} [{low:.1f}, {high:.1f}]"


TABLES = {make.__name__: make for make in (looking, overhead)}

if __name__ == "__main__":
    sys.exit(main())
