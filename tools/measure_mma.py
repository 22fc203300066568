"""MMA against a causal mask: the embedded model, the same rows, steps and seeds, measured after.

    python tools/measure_mma.py              everything that is not there yet
    python tools/measure_mma.py --list       the steps, and which of them are done
    python tools/measure_mma.py --only NAME  one step
    python tools/measure_mma.py --page       only figure and table, from docs/results/mma.json

Steps are commands that a user would type, as in tools/run_loop.py; what is done is skipped. At the
end docs/results/mma.json is written, docs/images/mma.svg drawn, and the table printed. The scenes
that are measured are of the split `natural`; nobody was trained on them, and no setting was chosen
on them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from embedded_tables import RESULTS, ROOT, table
from run_loop import Loop, Step

from benchmarks.reports.stored_runs import read_run

STORED = RESULTS / "mma.json"
FIGURE = ROOT / "docs" / "images" / "mma.svg"
SCENES, SCENE_SEED = 200, 70
UNSEEN_SEED = 72
COUNTS = {"chair": 300, "pope": 100, "text-dominance": 80}
"""Scenes of each measurement."""
SEEDS = (0, 1)
BEFORE = "before"
METRICS = {
    "chair": ("chair_s", "chair_i", "recall", "mean_length"),
    "pope": ("random_accuracy", "popular_accuracy", "adversarial_accuracy"),
    "text-dominance": ("mdi_early", "mdi_middle", "mdi_late"),
}
TITLES = {
    "chair_s": "CHAIR_s",
    "chair_i": "CHAIR_i",
    "recall": "recall",
    "mean_length": "words",
    "random_accuracy": "POPE random",
    "popular_accuracy": "POPE popular",
    "adversarial_accuracy": "POPE adversarial",
    "mdi_early": "dominance, early",
    "mdi_middle": "dominance, middle",
    "mdi_late": "dominance, late",
}
_PLAIN = {"mean_length", "mdi_early", "mdi_middle", "mdi_late"}


def models(seeds: tuple[int, ...] = SEEDS) -> list[str]:
    """The trained models, a pair per seed."""
    return [f"{kind}_{seed}" for seed in seeds for kind in ("causal", "mma")]


def steps(output: Path) -> list[Step]:
    """All of them, in their order."""
    data = output / "data"
    found = [
        Step(
            "data",
            f"{SCENES} scenes, their captions and questions",
            (
                (
                    "mmlm", "data", "world", "--count", str(SCENES), "--split", "train",
                    "--seed", str(SCENE_SEED), "--output", str(data),
                ),
            ),
        ),
        Step(
            "split",
            "one question a row",
            after=lambda: split(data / "conversations.jsonl", data / "single.jsonl"),
            needs=("data",),
        ),
        measuring(output, BEFORE),
    ]  # fmt: skip
    for seed in SEEDS:
        pair = [f"causal_{seed}", f"mma_{seed}"]
        commands = tuple(training(output, name, seed) for name in pair)
        found.append(
            Step(f"train_{seed}", f"both trainings, seed {seed}", commands, needs=("split",))
        )
        found += [measuring(output, name, f"train_{seed}") for name in pair]
    return found


def training(output: Path, name: str, seed: int) -> tuple[str, ...]:
    """One training in one process."""
    config = "train/world/mma" if name.startswith("mma") else "train/world/mma_causal"
    return (
        "mmlm", "train", "--config", config, "--seed", str(seed),
        "--output", str(output / "training" / name),
        "--recipe.init_args.data.files", json.dumps([str(output / "data" / "single.jsonl")]),
    )  # fmt: skip


def measuring(output: Path, name: str, needs: str = "") -> Step:
    """Captions, yes/no questions and text dominance of a model, beside each other."""
    model = "embedded" if name == BEFORE else str(output / "training" / name / "model")
    tokens = {"chair": ("84", "25"), "pope": ("4", "50"), "text-dominance": ("40", "20")}
    commands = tuple(
        (
            "mmlm", "bench", kind, "--model", model, "--split", "natural",
            "--seed", str(UNSEEN_SEED), "--count", str(count),
            "--generate.max_new_tokens", tokens[kind][0],
            "--generate.batch_size", tokens[kind][1],
            "--output", str(output / kind / name),
        )
        for kind, count in COUNTS.items()
    )  # fmt: skip
    return Step(f"measure_{name}", f"measured: {name}", commands, needs=(needs,) if needs else ())


def split(conversations: Path, single: Path) -> None:
    """One row per question and answer, each with the picture before its question."""
    lines = []
    for line in conversations.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        turns = row["messages"]
        for number in range(0, len(turns), 2):
            words = [part for part in turns[number]["content"] if part["type"] == "text"]
            asked = {"role": "user", "content": [{"type": "image"}, *words]}
            lines.append(
                {
                    "id": f"{row['id']}-{number // 2}",
                    "image": row["image"],
                    "messages": [asked, turns[number + 1]],
                }
            )
    text = "".join(json.dumps(line) + "\n" for line in lines)
    temporary = single.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(single)


def store(output: Path, seeds: tuple[int, ...], seconds: Mapping[str, float]) -> dict[str, Any]:
    """Reads all answers; every number with its interval, changes paired over the pictures."""
    names = [BEFORE, *models(seeds)]
    runs = {
        kind: {name: read_run(output / kind / name).scored.table for name in names}
        for kind in METRICS
    }
    record: dict[str, Any] = {
        "command": "python tools/measure_mma.py",
        "scenes": {"learned": SCENES, **COUNTS},
        "seconds": {name: round(value) for name, value in seconds.items() if value},
        "models": {},
        "changes": {},
    }
    for name in names:
        record["models"][name] = {
            metric: runs[kind][name].measure(metric, resamples=1000).as_json()
            for kind, metrics in METRICS.items()
            for metric in metrics
        }
        folder = output / "training" / name
        if name != BEFORE:
            log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            losses = [line["loss"] for line in log if "loss" in line]
            record["models"][name]["losses"] = losses
    pairs = {f"mma - causal, seed {s}": (f"causal_{s}", f"mma_{s}") for s in seeds}
    pairs |= {f"causal, seed {s} - before": (BEFORE, f"causal_{s}") for s in seeds}
    pairs |= {f"mma, seed {s} - before": (BEFORE, f"mma_{s}") for s in seeds}
    for title, (first, second) in pairs.items():
        record["changes"][title] = {}
        for kind, metrics in METRICS.items():
            for metric in metrics:
                change = runs[kind][first].difference(runs[kind][second], metric)
                interval = change.interval and [change.interval.low, change.interval.high]
                record["changes"][title][metric] = {"change": change.value, "interval": interval}
    STORED.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def results(record: Mapping[str, Any]) -> str:
    """The model before, and all changes; bold where the interval does not hold 0."""
    head = ("", *(TITLES[metric] for metrics in METRICS.values() for metric in metrics))
    before = record["models"][BEFORE]
    rows = [("before", *(_number(m, before[m]["value"]) for m in TITLES))]
    for title, changes in record["changes"].items():
        rows.append((title, *(_change(m, changes[m]) for m in TITLES)))
    return table(head, rows)


def _number(metric: str, value: float | None) -> str:
    if value is None:
        return "undefined"
    return f"{value:.2f}" if metric in _PLAIN else f"{100 * value:.1f}"


def _change(metric: str, change: Mapping[str, Any]) -> str:
    if change["change"] is None or change["interval"] is None:
        return "undefined"
    factor, digits = (1, 2) if metric in _PLAIN else (100, 1)
    low, high = (factor * end for end in change["interval"])
    text = f"{factor * change['change']:+.{digits}f} [{low:+.{digits}f}, {high:+.{digits}f}]"
    return text if low <= 0 <= high else f"**{text}**"


def draw(record: Mapping[str, Any], path: Path) -> None:
    """The difference between both trainings: a panel per number, a row per seed."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    wanted = {t: c for t, c in record["changes"].items() if t.startswith("mma - causal")}
    panels = ("chair_i", "chair_s", "recall", "adversarial_accuracy", "mdi_late")
    mpl.rcParams.update({"font.size": 9, "svg.hashsalt": "mma"})
    size = (2.2 * len(panels) + 1.2, 0.45 * len(wanted) + 0.9)
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=size, layout="constrained")
    for axis, metric in zip(axes, panels, strict=True):
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_title(TITLES[metric] + ("" if metric in _PLAIN else ", points"), fontsize=9)
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        for row, changes in enumerate(wanted.values()):
            change, factor = changes[metric], 1 if metric in _PLAIN else 100
            if change["interval"] is None:
                continue
            ends = [factor * end for end in change["interval"]]
            axis.plot(ends, [row, row], color="#0072B2", linewidth=1.8, solid_capstyle="butt")
            axis.plot(factor * change["change"], row, marker="o", color="#0072B2", markersize=5)
    axes[0].set_yticks(range(len(wanted)), list(wanted))
    axes[0].set_ylim(len(wanted) - 0.5, -0.5)
    figure.savefig(path, facecolor="white", metadata={"Date": None})
    plt.close(figure)


def main() -> int:
    """Carries out what is missing, then writes the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("runs/mma"), help="folder of the runs")
    parser.add_argument("--only", help="carry out this step alone; needs those before it")
    parser.add_argument("--list", action="store_true", help="show the steps, do nothing")
    parser.add_argument("--page", action="store_true", help="only figure and table")
    options = parser.parse_args()
    os.chdir(ROOT)
    if not options.page:
        every = steps(options.output)
        loop = Loop(options.output, every)
        finished = {step.name for step in every if loop.done(step)}
        if options.list:
            for step in every:
                print(f"{'done   ' if step.name in finished else 'missing'} {step.name}")
            return 0
        for number, step in enumerate(every, start=1):
            chosen = options.only in (None, step.name)
            if step.name not in finished and chosen:
                if missing := [name for name in step.needs if name not in finished]:
                    raise SystemExit(f"error: {step.name} needs {', '.join(missing)} before it.")
                loop.run(step, number)
                finished.add(step.name)
        whole = tuple(s for s in SEEDS if {f"measure_{name}" for name in models((s,))} <= finished)
        if whole and f"measure_{BEFORE}" in finished:
            store(options.output, whole, loop.seconds())
    if STORED.exists():
        record = json.loads(STORED.read_text(encoding="utf-8"))
        draw(record, FIGURE)
        print(results(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
