"""Writes the tables and the figure of DyVTE from what measure_dyvte.py stored.

    python tools/dyvte_page.py

Tables are printed as Markdown; the figure is docs/images/dyvte.svg. Changes are paired over the
pictures, with 95 % bootstrap intervals, bold where the interval excludes zero.
"""

from __future__ import annotations

import functools
import json
import statistics
import sys
from typing import Any

from effects_page import Effect, difference
from embedded_tables import table
from measure_dyvte import DOMINANCE, HIDDEN, STORED
from measure_effects import PLAIN, ROOT, Setting

import mmlm
from mmlm.engine import flops

FIGURE = ROOT / "docs" / "images" / "dyvte.svg"
MEASURES = ("chair_s", "chair_i", "recall")
VISUAL = 100
"""Visual tokens of a picture of the embedded model."""


def exits(rows: list[list[float]], threshold: float) -> list[int]:
    """The first layer of each row whose margin exceeds the threshold; the last one if none does."""
    return [
        next((layer for layer, m in enumerate(row) if m > threshold), len(row) - 1) for row in rows
    ]


def saved(config: Any, layers: list[int], text: int, new: int, *, asked: bool) -> dict[str, float]:
    """Share of operations that exits after these layers save, in the first pass and afterwards.

    Args:
        config: the decoder's.
        layers: exit of each prompt.
        text: tokens of a prompt without the picture's.
        new: generated tokens.
        asked: whether routers ran up to the exit.
    """
    count, n = config.num_hidden_layers, text + VISUAL
    router = (2 * 2 * config.hidden_size * HIDDEN + 2 * HIDDEN * 2) * asked
    whole = flops.prefill(config, [n] * count, causal=True)
    steps = sum(flops.decode_step(config, [n + k] * count) for k in range(1, new))
    first, later = [], []
    for layer in layers:
        lengths = [n if number <= layer else text for number in range(count)]
        ours = flops.prefill(config, lengths, causal=True) + (layer + 1) * router
        first.append(1 - ours / whole)
        shorter = sum(flops.decode_step(config, [m + k for m in lengths]) for k in range(1, new))
        later.append(1 - shorter / steps if steps else 0.0)
    return {"first_pass": statistics.mean(first), "decoding": statistics.mean(later)}


@functools.cache
def _config() -> Any:
    return mmlm.load("embedded")[0].config.get_text_config()


def effects_of(record: dict[str, Any]) -> dict[str, Effect]:
    """Name -> what the setting gave."""
    return {n: Effect(Setting(n, n, 0), found) for n, found in record["settings"].items()}


def exit_layers(record: dict[str, Any], name: str, kind: str) -> list[int]:
    """Exits of a setting, prompt by prompt."""
    rows = record["margins"][kind]["margins"]
    if name == PLAIN:
        return [len(rows[0]) - 1] * len(rows)
    if name.startswith("fixed"):
        return [int(name.split()[1])] * len(rows)
    return exits(rows, float(name))


def savings(record: dict[str, Any], name: str, kind: str) -> dict[str, float]:
    """Operations saved by a setting on one kind of prompts, and the mean exit."""
    layers = exit_layers(record, name, kind)
    plain = effects_of(record)[PLAIN]
    new = round(plain.captions.measure("mean_length").value or 1) if kind == "captions" else 2
    asked = name != PLAIN and not name.startswith("fixed")
    text = record["margins"][kind]["text"]
    return {
        **saved(_config(), layers, text, new, asked=asked),
        "mean_exit": statistics.mean(layers),
    }


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _label(name: str) -> str:
    if name == PLAIN:
        return "none (plain)"
    return name.replace("fixed", "all after layer") if "fixed" in name else f"routers, > {name}"


def quality(record: dict[str, Any]) -> str:
    """What every setting changes, and what it saves."""
    effects = effects_of(record)
    plain = effects[PLAIN]
    head = (
        "exit", "captions: mean exit", "saved, first pass", "decoding", "CHAIR_s", "CHAIR_i",
        "recall", "captions changed", "questions: mean exit", "saved", "POPE random", "popular",
        "adversarial",
    )  # fmt: skip
    rows = []
    for name, effect in effects.items():
        first, same = savings(record, name, "captions"), name == PLAIN
        asked = savings(record, name, "questions")
        cells = [_label(name), "" if same else f"{first['mean_exit']:.2f}"]
        cells += [_percent(first["first_pass"]), _percent(first["decoding"])]
        cells += [_cell(plain.captions, effect.captions, m, same=same) for m in MEASURES]
        cells += ["" if same else effect.changed(plain)]
        cells += ["" if same else f"{asked['mean_exit']:.2f}", _percent(asked["first_pass"])]
        cells += [
            _cell(plain.polls[kind], answers, "accuracy", same=same)
            for kind, answers in effect.polls.items()
        ]
        rows.append(cells)
    return table(head, rows)


def _cell(plain: Any, other: Any, name: str, *, same: bool) -> str:
    """A value of plain decoding itself in percent, else the change in points."""
    if same:
        return _percent(plain.measure(name).value or 0)
    change = difference(plain, other, name)
    if change.value is None or change.interval is None:
        return "undefined"
    low, high = change.interval.low, change.interval.high
    text = f"{100 * change.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if change.is_clear else text


def by_layer(record: dict[str, Any]) -> str:
    """How often an exit is harmless, how often its router is right, and who exits there."""
    training = record["training"]
    head = (
        "layer", "exit harmless: captions", "questions", "questions, ratio 1.1",
        "router right: keep", "exit", "captions that exit here", "questions that exit here",
    )  # fmt: skip
    rows = []
    last = len(record["margins"]["captions"]["margins"][0]) - 1
    for layer in range(last + 1):
        cells = [str(layer)]
        cells += [_percent(s.get(str(layer), 0.0)) for s in training["harmless"].values()]
        for what in ("keep", "exit"):
            value = training["evaluation"].get(f"layer_{layer:02}/{what}")
            cells.append("no such label" if value is None else _percent(value))
        for kind in ("captions", "questions"):
            own = exit_layers(record, "0.0", kind)
            share = _percent(own.count(layer) / len(own))
            cells.append(f"{share} (none)" if layer == last else share)
        rows.append(cells)
    return table(head, rows)


def dominance(record: dict[str, Any]) -> str:
    """Text dominance and attention on the picture by stage, before and after."""
    head = ("", "MDI early", "middle", "late", "attention on the picture: early", "middle", "late")
    rows = []
    for name in DOMINANCE:
        counts = _counts(record["settings"][name]["dominance"])
        cells = [_label(name)]
        for metric in ("mdi", "attention_image"):
            for stage in ("early", "middle", "late"):
                value = counts.measure(f"{metric}_{stage}").value
                cells.append("nothing left" if value is None else f"{value:.2f}")
        rows.append(cells)
    return table(head, rows)


def _counts(stored: dict[str, Any]) -> Any:
    import numpy as np

    from benchmarks.base import CountTable
    from benchmarks.text_dominance import _metrics

    columns = stored["columns"]
    counts = np.array(list(columns.values()), dtype=np.float64).T
    return CountTable(tuple(columns), tuple(stored["images"]), counts, _metrics())


def _score(effect: Effect, kind: str) -> float:
    """Recall of captions, or accuracy over the three kinds of POPE, in percent."""
    if kind == "captions":
        return 100 * (effect.captions.measure("recall").value or 0)
    polls = effect.polls.values()
    return 100 * statistics.mean(answers.measure("accuracy").value or 0 for answers in polls)


def figure(record: dict[str, Any]) -> None:
    """Left: labels and exits by layer. Right: what is lost for what is saved."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dyvte"
    import matplotlib.pyplot as plt

    pink, orange, blue = "#CC79A7", "#E69F00", "#0072B2"  # told apart by colour-blind readers
    drawing, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.2), layout="constrained")
    harmless = record["training"]["harmless"]
    layers = sorted(map(int, harmless["captions"]))
    for kind, colour, mark in (("captions", orange, "s"), ("questions", blue, "o")):
        shares = [100 * harmless[kind][str(x)] for x in layers]
        left.plot(layers, shares, f"{mark}-", color=colour, label=f"{kind}: exit is harmless")
        own = exit_layers(record, "0.0", kind)
        gone = [100 * sum(e <= x for e in own) / len(own) for x in layers[:-1]]
        left.plot(layers[:-1], gone, f"{mark}:", color=colour, label=f"{kind}: have exited")
    left.set(xlabel="layer", ylabel="% of prompts", ylim=(-3, 103))
    left.legend(fontsize=7)
    effects = effects_of(record)
    for axes, kind, what in (
        (middle, "captions", "recall, %"),
        (right, "questions", "POPE accuracy, %"),
    ):
        for label, colour, mark in (("all alike", pink, "^-"), ("routers", blue, "o")):
            names = [
                n for n in effects if n != PLAIN and n.startswith("fixed") == (label == "all alike")
            ]
            x = [100 * savings(record, n, kind)["first_pass"] for n in names]
            axes.plot(x, [_score(effects[n], kind) for n in names], mark, color=colour, label=label)
        axes.axhline(_score(effects[PLAIN], kind), color="black", linewidth=0.8, label="plain")
        axes.set(xlabel=f"% of operations saved, {kind}", ylabel=what)
        axes.legend(fontsize=7)
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(FIGURE, metadata={"Date": None})
    plt.close(drawing)


def main() -> int:
    """Figure, then tables."""
    record = json.loads(STORED.read_text(encoding="utf-8"))
    figure(record)
    print("\n\n".join(make(record) for make in (quality, by_layer, dominance)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
