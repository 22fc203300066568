"""Writes the tables of docs/loop.md and its figure from what run_loop.py measured.

    python tools/loop_page.py            rewrite tables and figure
    python tools/loop_page.py --check    exit code 1 if the page is not up to date

Changes are paired over the pictures, with 95 % bootstrap intervals. The text between the tables is
written by hand.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from embedded_tables import MARKED, RESULTS, ROOT, table

from benchmarks.base import CountTable, Scored
from benchmarks.reports.stored_runs import read_run

STORED = RESULTS / "loop.json"
DOCUMENT = ROOT / "docs" / "loop.md"
FIGURE = ROOT / "docs" / "images" / "loop.png"
CAPTIONS = ("chair_i", "chair_s", "recall", "mean_length", "duplicate_sentence_share")
POLLS = ("random", "popular", "adversarial")
TITLES = {
    "before": "before",
    "c_dpo": "C-DPO",
    "c_dpo_half": "C-DPO, half of the pairs",
    "c_dpo_quarter": "C-DPO, a quarter of the pairs",
    "whole_captions": "plain DPO, whole captions",
}
"""Name of a model: how the page calls it."""
COLOURS = ("#0072B2", "#56B4E9", "#56B4E9", "#009E73", "#D55E00")  # Okabe and Ito
MARKERS = ("o", "s", "^", "D", "X")


def store(output: Path, models: Sequence[str], seconds: Mapping[str, float]) -> None:
    """Reads the answers of all models and writes their numbers.

    Args:
        output: folder of the loop.
        models: the model before training, then the trained ones.
        seconds: how long each step took.
    """
    runs = {
        kind: {name: read_run(output / kind / name).scored for name in models}
        for kind in ("chair", "pope")
    }
    record = {
        "command": "python tools/run_loop.py",
        "commit": _commit(),
        "versions": {name: version(name) for name in ("torch", "transformers", "trl", "deepspeed")},
        "seconds": dict(seconds),
        "pairs": {
            "sentences": _lines(output / "pairs" / "pairs.jsonl"),
            "whole captions": _lines(output / "whole.jsonl"),
        },
        "trainings": {name: _training(output / "training" / name) for name in models[1:]},
        "pictures": len(runs["chair"][models[0]].table.images),
        "pictures asked about": len(runs["pope"][models[0]].table.images),
        "models": {name: _measured(runs, models[0], name) for name in models},
    }
    STORED.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _measured(
    runs: Mapping[str, Mapping[str, Scored]], before: str, name: str
) -> dict[str, dict[str, Any]]:
    """Every number of a model, and its change."""
    found = {}
    for kind, names in (("chair", CAPTIONS), ("pope", tuple(f"{p}_accuracy" for p in POLLS))):
        first, own = (runs[kind][one].table for one in (before, name))
        for metric in names:
            found[metric] = _one(first, own, metric)
    return found


def _one(first: CountTable, own: CountTable, metric: str) -> dict[str, Any]:
    measure = own.measure(metric, resamples=1000).as_json()
    if first is not own:
        change = first.difference(own, metric)
        interval = change.interval
        measure["change"] = change.value
        measure["change_interval"] = interval and [interval.low, interval.high]
    return measure


def _training(folder: Path) -> dict[str, Any]:
    finished = json.loads((folder / "finished.json").read_text())
    return {"steps": finished["steps"]}


def _lines(path: Path) -> int:
    with path.open(encoding="utf-8") as stream:
        return sum(1 for _ in stream)


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def results(record: Mapping[str, Any]) -> str:
    """The model before, and what each training changed."""
    head = (
        "model", "CHAIR_i", "CHAIR_s", "recall", "words", "duplicate sentences",
        *(f"POPE {kind}" for kind in POLLS),
    )  # fmt: skip
    rows = [
        (TITLES[name], *(_cell(metric, measure) for metric, measure in measures.items()))
        for name, measures in record["models"].items()
    ]
    return table(head, rows)


def _cell(metric: str, measure: Mapping[str, Any]) -> str:
    factor = 1 if metric == "mean_length" else 100
    if measure["value"] is None:
        return "undefined"
    if "change" not in measure:
        return f"{factor * measure['value']:.1f}"
    if measure["change_interval"] is None:
        return "undefined"
    low, high = measure["change_interval"]
    text = (
        f"{_signed(factor * measure['change'])} [{_signed(factor * low)}, {_signed(factor * high)}]"
    )
    return text if low <= 0 <= high else f"**{text}**"


def _signed(value: float) -> str:
    text = f"{value:+.1f}"
    return "0.0" if text in ("+0.0", "-0.0") else text


def times(record: Mapping[str, Any]) -> str:
    """Minutes of the parts."""
    parts: dict[str, float] = {}
    for name, seconds in record["seconds"].items():
        kind, _, own = name.partition("_")
        title = f"training, {TITLES[own]}" if kind == "train" else _PARTS[kind]
        parts[title] = parts.get(title, 0.0) + seconds
    rows = [(title, f"{seconds / 60:.1f}") for title, seconds in parts.items()]
    return table(("part", "minutes"), [*rows, ("all", f"{sum(parts.values()) / 60:.1f}")])


_PARTS = {
    "pairs": "pairs",
    "whole": "whole captions from pairs",
    "chair": "captions of all models",
    "pope": "yes/no questions of all models",
}
TABLES = {"loop_results": results, "loop_times": times}


def draw(record: Mapping[str, Any], path: Path) -> None:
    """The figure: one row per training, one panel per number."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    trained = {name: m for name, m in record["models"].items() if "change" in m["chair_i"]}
    panels = {
        "chair_i": "CHAIR_i, points",
        "recall": "recall, points",
        "adversarial_accuracy": "POPE adversarial, points",
        "mean_length": "words per caption",
    }
    mpl.rcParams.update({"font.size": 9})
    size = (2.5 * len(panels) + 1.8, 0.42 * len(trained) + 0.9)
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=size, layout="constrained")
    for axis, (metric, title) in zip(axes, panels.items(), strict=True):
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        for row, measures in enumerate(trained.values()):
            measure = measures[metric]
            if measure["change_interval"] is None:
                continue
            factor = 1 if metric == "mean_length" else 100
            colour = COLOURS[row % len(COLOURS)]
            ends = [factor * end for end in measure["change_interval"]]
            axis.plot(ends, [row, row], color=colour, linewidth=1.8, solid_capstyle="butt")
            marker = MARKERS[row % len(MARKERS)]
            axis.plot(factor * measure["change"], row, marker=marker, color=colour, markersize=5)
    axes[0].set_yticks(range(len(trained)), [TITLES[name] for name in trained])
    axes[0].set_ylim(len(trained) - 0.5, -0.5)
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})
    plt.close(figure)


def page(record: Mapping[str, Any], before: str) -> str:
    """The document with its tables replaced."""
    return MARKED.sub(lambda m: f"{m[1]}{TABLES[m[2]](record)}{m[3]}", before)


def write() -> None:
    """Rewrites tables and figure."""
    record = json.loads(STORED.read_text(encoding="utf-8"))
    DOCUMENT.write_text(page(record, DOCUMENT.read_text(encoding="utf-8")), encoding="utf-8")
    draw(record, FIGURE)


def main() -> int:
    """Rewrites or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    if parser.parse_args().check:
        before = DOCUMENT.read_text(encoding="utf-8")
        return int(before != page(json.loads(STORED.read_text(encoding="utf-8")), before))
    write()
    return 0


if __name__ == "__main__":
    sys.exit(main())
