"""Measures CrossLMM on the embedded model: 4 x 4 pooled tokens with and without cross-attention.

    mmlm data world --count 800 --split train --seed 71 --output runs/crosslmm/data
    for stage in crosslmm_1 crosslmm_2 pooled_1 pooled_2
    do mmlm train --config train/world/$stage; done
    python tools/measure_crosslmm.py                what is not there yet
    python tools/measure_crosslmm.py --page         prints the tables, draws the figure

Four models: the embedded one as it is (100 visual tokens), the same on pooled tokens without any
training, and the two that were trained alike on pooled tokens. Captions and yes/no questions as in
`measure_effects.py`, text dominance, and the time of a prefill with its pictures, the models taking
turns. docs/results/crosslmm.json is written after every model: a killed run goes on with the next.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from contextlib import ExitStack
from importlib.metadata import version
from typing import Any

import measure_effects
import measure_pruning
from embedded_tables import table
from measure_effects import PLAIN, ROOT, Setting
from measure_embedded import QUESTION, SPLIT, Pictures, picture

import mmlm
from mmlm.inputs import message, prepare
from mmlm.runner import fingerprint

RESULT = ROOT / "docs" / "results" / "crosslmm.json"
FIGURE = ROOT / "docs" / "images" / "crosslmm.svg"
RUNS = ROOT / "runs" / "crosslmm"
POOLED = "CrossLMM(grid=4, v2v=False, t2v=False)"
MODELS: dict[str, tuple[str, str]] = {
    "whole": ("embedded", PLAIN),
    "pooled, untrained": ("embedded", POOLED),
    "pooled": (str(RUNS / "pooled_2" / "model"), PLAIN),
    "CrossLMM": (str(RUNS / "cross_2" / "model"), PLAIN),
}
"""Name: the model, and what is attached to it."""
REFERENCE = "pooled"
PREFILL_ROWS, REPEATS = 16, 11
METRICS = (
    ("chair_s", "CHAIR_s"),
    ("chair_i", "CHAIR_i"),
    ("recall", "recall"),
    ("mean_length", "words"),
    ("duplicate_sentence_share", "duplicate sentences"),
)


def load(name: str) -> tuple[Any, Any, Setting]:
    """A model, its processor, and what is attached."""
    path, text = MODELS[name]
    model, processor = mmlm.load(path, dtype="float32")
    return model, processor, Setting(PLAIN if text == PLAIN else "CrossLMM", text, 0)


def prefills(pictures: Pictures) -> dict[str, float]:
    """Milliseconds of a first pass over a batch, tower included: medians, models taking turns."""
    import torch

    scenes = pictures.scenes()[:PREFILL_ROWS]
    times: dict[str, list[float]] = {name: [] for name in MODELS}
    with ExitStack() as stack, torch.inference_mode():
        loaded = {}
        for name in MODELS:
            model, processor, setting = load(name)
            texts = [[message("user", QUESTION, 1)]] * len(scenes)
            inputs = prepare(processor, texts, [[picture(s)] for s in scenes])
            if setting.methods:
                stack.enter_context(mmlm.attach(model, *setting.methods))
            loaded[name] = (model, inputs)
        for repeat in range(REPEATS + 2):
            for name, (model, inputs) in loaded.items():
                began = time.perf_counter()
                model(**inputs, logits_to_keep=1)
                if repeat >= 2:  # the first two warm up
                    times[name].append(1000 * (time.perf_counter() - began))
    return {name: round(statistics.median(found), 2) for name, found in times.items()}


def gates() -> dict[str, float]:
    """What the gates of the trained model are, after their tanh."""
    import torch

    model, _, _ = load("CrossLMM")
    return {
        name.removesuffix(".gate"): round(float(torch.tanh(p.detach().float())), 4)
        for name, p in model.mmlm_methods["CrossLMM"].named_parameters()
        if name.endswith(".gate")
    }


def store(record: dict[str, Any]) -> None:
    """Writes what is there so far."""
    measure_effects.store(RESULT, record)


def effects(record: dict[str, Any]) -> str:
    """Every model in its own numbers, and CrossLMM against pooling alone."""
    from effects_page import Effect, change_cell, difference

    found = {name: Effect(Setting(PLAIN, name, 0), kept) for name, kept in record["models"].items()}
    kinds = ("random", "popular", "adversarial")
    head = ["model", *(title for _, title in METRICS), *(f"POPE {kind}" for kind in kinds)]
    rows = []
    for name, effect in found.items():
        cells = [name]
        for metric, _ in METRICS:
            value = effect.captions.measure(metric).value or 0.0
            cells.append(f"{value:.1f}" if metric == "mean_length" else f"{100 * value:.1f}")
        for kind in kinds:
            value = effect.polls[kind].measure("accuracy").value or 0.0
            cells.append(f"{100 * value:.1f}")
        rows.append(cells)
    if REFERENCE in found and "CrossLMM" in found:
        plain, cross = found[REFERENCE], found["CrossLMM"]
        cells = [f"CrossLMM - {REFERENCE}"]
        for metric, _ in METRICS:
            change = difference(plain.captions, cross.captions, metric)
            cells.append(change_cell(change, 1 if metric == "mean_length" else 100))
        cells += [
            change_cell(difference(plain.polls[k], cross.polls[k], "accuracy"), 100) for k in kinds
        ]
        rows.append(cells)
    return table(head, rows)


def attention(record: dict[str, Any]) -> str:
    """Text dominance, and the share of attention that the picture gets."""
    stages = ("early", "middle", "late")
    names = [f"{kind}_{stage}" for kind in ("mdi", "attention_image") for stage in stages]
    lines = []
    for name, kept in record["models"].items():
        means = kept["dominance"]["means"]
        lines.append([name, *(f"{means[n]:.3g}" for n in names if n in means)])
    return table(["model", *names], lines)


def prefill_times(record: dict[str, Any]) -> str:
    """Times of a first pass; none yet: an empty table."""
    times = record.get("prefill_ms", {})
    whole = times.get("whole", 0.0)
    lines = [[name, f"{t:.0f}", f"{whole / t:.2f}"] for name, t in times.items()]
    return table(["model", "prefill, ms", "times faster"], lines)


def draw(record: dict[str, Any]) -> None:
    """The figure: what the four models invent, recall and answer, with 95 % intervals."""
    import matplotlib as mpl

    mpl.use("Agg")
    from effects_page import COLOURS, Effect
    from matplotlib import pyplot as plt

    found = {name: Effect(Setting(PLAIN, name, 0), kept) for name, kept in record["models"].items()}
    panels = (("CHAIR_i, %", "chair_i"), ("recall, %", "recall"), ("POPE, %", "mean_accuracy"))
    mpl.rcParams.update({"svg.hashsalt": "mmlm", "font.size": 9, "svg.fonttype": "none"})
    size = (2.6 * len(panels) + 1.4, 0.42 * len(found) + 0.9)
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=size, layout="constrained")
    for axis, (title, metric) in zip(axes, panels, strict=True):
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        for row, effect in enumerate(found.values()):
            counts = effect.mean_poll if metric == "mean_accuracy" else effect.captions
            measured = counts.measure(metric)
            if measured.value is None:
                continue
            if measured.interval is not None:
                ends = [100 * measured.interval.low, 100 * measured.interval.high]
                axis.plot(ends, [row, row], color=COLOURS[0], linewidth=1.6)
            axis.plot(100 * measured.value, row, marker="o", color=COLOURS[0], markersize=4)
    axes[0].set_yticks(range(len(found)), list(found))
    axes[0].set_ylim(len(found) - 0.5, -0.5)
    figure.savefig(FIGURE, metadata={"Date": None})
    plt.close(figure)


def _means(stored: dict[str, Any]) -> dict[str, float]:
    """Means of the text dominance of a model."""
    import numpy as np

    from benchmarks.base import CountTable
    from benchmarks.text_dominance import _metrics

    counts = np.array(list(stored["columns"].values()), dtype=np.float64).T
    measured = CountTable(tuple(stored["columns"]), tuple(stored["images"]), counts, _metrics())
    values = {name: measured.measure(name).value for name in measured.ratios}
    return {name: round(value, 4) for name, value in values.items() if value is not None}


def main() -> int:
    """Measures what is missing, or prints the tables."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=200, help="pictures to caption")
    parser.add_argument("--page", action="store_true", help="only print the tables")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    record: dict[str, Any] = {"pictures": arguments.images, "split": SPLIT, "models": {}}
    if RESULT.exists():
        record = json.loads(RESULT.read_text(encoding="utf-8"))
    if arguments.page:
        print("\n\n".join(make(record) for make in (effects, attention, prefill_times)))
        draw(record)
        return 0
    torch.set_num_threads(arguments.threads)
    pictures = Pictures(SPLIT, arguments.images)
    for name in MODELS:
        model, processor, setting = load(name)
        known = record["models"].get(name)
        if known is not None and known["model"] == fingerprint(model):
            continue
        kept = measure_effects.measure(model, processor, setting, pictures)
        dominance = measure_pruning.dominance(model, processor, setting, pictures)
        kept["dominance"] = {**dominance, "means": _means(dominance)}
        kept["model"] = fingerprint(model)
        record["models"][name] = kept
        record.pop("prefill_ms", None)
        store(record)
        print(f"{name}: {kept['seconds']:.0f} s", file=sys.stderr, flush=True)
    if "prefill_ms" not in record:
        record["prefill_ms"] = prefills(pictures)
        record["gates"] = gates()
        record["information"] = {
            "commit": measure_effects.commit(),
            "threads": arguments.threads,
            **{name: version(name) for name in ("torch", "transformers")},
        }
        store(record)
    print("\n\n".join(make(record) for make in (effects, attention, prefill_times)))
    draw(record)
    return 0


if __name__ == "__main__":
    sys.exit(main())
