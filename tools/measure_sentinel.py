"""Makes SENTINEL pairs on the embedded world, compares them with the truth; fills docs/data.md.

    python tools/measure_sentinel.py            run both settings, then write figures and table
    python tools/measure_sentinel.py --tables   only write the table again
    python tools/measure_sentinel.py --check    exit code 1 if the page is not up to date

Runs go on where they stopped, in runs/. A time is that of a run made in one go: one that was there
already keeps the time that was measured then.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from embedded_tables import MARKED, RESULTS, ROOT, table

from data_tools.merging import merge_shards
from data_tools.sentinel.report import write_report
from data_tools.sentinel.summary import summarise
from data_tools.sentinel.truth import judge_pairs

RATES = "misses=0.1, false_alarms=0.1"
SETTINGS = {
    "world_sentinel": ("exact", "world_sentinel", ()),
    "world_sentinel_noisy": ("two, 5 % misses, 5 % false alarms", "world_sentinel_noisy", ()),
    "world_sentinel_noisy_10": (
        "two, 10 % misses, 10 % false alarms",
        "world_sentinel_noisy",
        (f'--detectors=["WorldTruth({RATES}, seed=1)", "WorldTruth({RATES}, seed=2)"]',),
    ),
}
"""Folder under runs/: title, configuration, and what is given besides it."""
PROCESSES = 2
FIGURES = RESULTS / "sentinel_world.json"
SPEED = RESULTS / "prefix_cache.json"  # by tools/prefix_cache_speed.py
DOCUMENT = ROOT / "docs" / "data.md"


def main() -> int:
    """Runs, measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", action="store_true", help="only write the table")
    parser.add_argument("--check", action="store_true", help="only compare the table")
    options = parser.parse_args()
    if not (options.tables or options.check):
        records = {
            name: measure(ROOT / "runs" / name, config, more)
            for name, (_, config, more) in SETTINGS.items()
        }
        earlier = json.loads(FIGURES.read_text()) if FIGURES.exists() else {}
        for name, record in records.items():
            if record["minutes"] is None:
                record["minutes"] = earlier.get(name, {}).get("minutes")
        FIGURES.write_text(json.dumps(records, indent=2, ensure_ascii=False) + "\n")
    figures = json.loads(FIGURES.read_text())
    before = DOCUMENT.read_text(encoding="utf-8")
    speed = json.loads(SPEED.read_text())
    tables = {"sentinel_world": rows(figures), "prefix_cache": speed_rows(speed)}
    after = MARKED.sub(lambda m: f"{m[1]}{tables[m[2]]}{m[3]}", before)
    if options.check:
        return int(before != after)
    DOCUMENT.write_text(after, encoding="utf-8")
    return 0


def measure(folder: Path, config: str, more: Sequence[str]) -> dict[str, Any]:
    """Runs one setting in two processes and judges its pairs."""
    before = None if folder.exists() else time.monotonic()
    running = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "mmlm", "data", "sentinel", "--config", f"data/{config}"),
                *("--output", str(folder), "--shard", f"{index}/{PROCESSES}"),
                *more,
            ],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        for index in range(PROCESSES)
    ]
    if failed := [process.args for process in running if process.wait()]:
        raise SystemExit(f"failed: {failed}")
    minutes = None if before is None else round((time.monotonic() - before) / 60, 2)
    merge_shards(folder)
    write_report(folder)
    judgement = judge_pairs(folder)
    if judgement is None:
        raise SystemExit(f"{folder} holds no pair of drawn pictures")
    return {
        "command": shlex.join(["mmlm", "data", "sentinel", "--config", f"data/{config}", *more]),
        "minutes": minutes,
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
    for name, (detectors, _, _) in SETTINGS.items():
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


def speed_rows(speed: dict[str, Any]) -> str:
    """The table about the prefix cache."""
    small = speed["small"]
    models = {
        "embedded": "embedded model",
        "small": f"{small['layers']} layers, width {small['width']}, "
        f"{small['image_tokens']} image tokens",
    }
    head = ("model", "steps", "cached, s", "fresh, s", "naive, s", "to fresh", "to naive")
    lines = [
        (
            title,
            str(speed[name]["steps"]),
            *(f"{speed[name]['seconds'][kind]:.1f}" for kind in ("cached", "fresh", "naive")),
            *(f"{speed[name][f'times_faster_than_{kind}']:.2f} x" for kind in ("fresh", "naive")),
        )
        for name, title in models.items()
    ]
    return table(head, lines)


if __name__ == "__main__":
    sys.exit(main())
