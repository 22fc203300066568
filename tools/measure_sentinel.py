"""Makes SENTINEL pairs on the embedded world and compares them with the truth; fills docs/data.md.

    python tools/measure_sentinel.py            run both settings, then write figures and table
    python tools/measure_sentinel.py --tables   only write the table again
    python tools/measure_sentinel.py --check    exit code 1 if the page is not up to date

Both runs go on where they stopped, in runs/; a time is written only for a run made in one go.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from embedded_tables import MARKED, RESULTS, ROOT, table

from data_tools.merging import merge_shards
from data_tools.sentinel.report import write_report
from data_tools.sentinel.summary import summarise
from data_tools.sentinel.truth import judge_pairs

SETTINGS = {"world_sentinel": "exact", "world_sentinel_noisy": "10 % misses, 10 % false alarms"}
PROCESSES = 2
FIGURES = RESULTS / "sentinel_world.json"
DOCUMENT = ROOT / "docs" / "data.md"


def main() -> int:
    """Runs, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only write the table")
    parser.add_argument("--check", action="store_true", help="only compare the table")
    options = parser.parse_args()
    if not (options.tables or options.check):
        records = {name: measure(name, ROOT / "runs" / name) for name in SETTINGS}
        FIGURES.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    figures = json.loads(FIGURES.read_text())
    before = DOCUMENT.read_text(encoding="utf-8")
    tables = {"sentinel_world": rows(figures)}
    after = MARKED.sub(lambda m: f"{m[1]}{tables.get(m[2], '')}{m[3]}", before)
    if options.check:
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


def measure(name: str, folder: Path) -> dict[str, Any]:
    """Runs one setting in two processes and judges its pairs."""
    fresh = not folder.exists()
    started = time.monotonic()
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "mmlm", "data", "sentinel", "--config", f"data/{name}"),
                *("--output", str(folder), "--shard", f"{index}/{PROCESSES}"),
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for index in range(PROCESSES)
    ]
    if failed := [process.args for process in running if process.wait()]:
        raise SystemExit(f"failed: {failed}")
    minutes = (time.monotonic() - started) / 60
    merge_shards(folder)
    write_report(folder)
    judgement = judge_pairs(folder)
    if judgement is None:
        raise SystemExit(f"{folder} holds no pair of drawn pictures")
    return {
        "config": f"configs/data/{name}.yaml",
        "minutes": round(minutes, 2) if fresh else None,
        "processes": PROCESSES,
        "summary": summarise(folder).as_json(),
        "judgement": judgement.as_json(),
    }


def rows(figures: dict[str, Any]) -> str:
    """The table of the page."""
    head = (
        "detectors", "scenes", "pairs", "minutes", "rejected with an absent object",
        "chosen with none", "objects called absent that are",
    )  # fmt: skip
    lines = []
    for name, detectors in SETTINGS.items():
        record = figures[name]
        judged = record["judgement"]
        lines.append(
            (
                detectors,
                f"{sum(record['summary']['images'].values()):,}",
                f"{judged['pairs']:,}",
                "-" if record["minutes"] is None else f"{record['minutes']:.1f}",
                *(
                    f"{judged[f'{part}_right']:,} ({100 * judged[f'{part}_precision']:.2f} %)"
                    for part in ("rejected", "chosen", "named")
                ),
            )
        )
    return table(head, lines)


if __name__ == "__main__":
    sys.exit(main())
