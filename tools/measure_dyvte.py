"""Measures what an early exit of visual tokens changes on the embedded model (docs/effects.md).

    python tools/measure_dyvte.py             everything that is not there yet
    python tools/measure_dyvte.py --page      only figure and tables, from docs/results/dyvte.json

The routers come from `mmlm train --config train/world/dyvte` (its file says how the data is made).
Measured are plain decoding, an exit after each layer for every prompt alike (`DyVTE.fixed`, what
routers have to beat), and the routers at several thresholds: captions, yes/no questions, text
dominance, and the exits with the operations that they save. Every setting is stored as soon as it
is finished; a killed run goes on with the one that was running. Scenes: the split `natural`.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from effects_page import Effect, difference
from embedded_tables import table
from measure_effects import PLAIN, ROOT, Setting, _commit, measure
from measure_embedded import QUESTION, SPLIT, Pictures, _picture
from measure_pruning import dominance

import mmlm
from mmlm.engine import flops
from mmlm.runner import GenerateSettings, Request, fingerprint, generate_all

STORED = ROOT / "docs" / "results" / "dyvte.json"
FIGURE = ROOT / "docs" / "images" / "dyvte.svg"
RUN = ROOT / "runs" / "world" / "dyvte"
HIDDEN = 256
THRESHOLDS = (0.0, -1.0, -2.0, 1.0)
MEASURES = ("chair_s", "chair_i", "recall")
DOMINANCE = ("plain", "0.0")
"""Settings whose text dominance is measured: plain, and the routers as they were trained."""


def router_text(file: Path, threshold: float) -> str:
    """The routers as a method's text form."""
    return f"DyVTE(weights_file={str(file)!r}, hidden={HIDDEN}, threshold={threshold})"


def settings(file: Path, n_layers: int) -> dict[str, Setting]:
    """Name -> way of decoding. An exit after the last layer is plain decoding."""
    found = {PLAIN: Setting(PLAIN, PLAIN, 0)}
    for threshold in THRESHOLDS:
        found[str(threshold)] = Setting("DyVTE", router_text(file, threshold), 0)
    for layer in range(n_layers - 1):
        found[f"fixed {layer}"] = Setting("DyVTE", f"DyVTE(exit_layer={layer})", 1)
    return found


def margins(model: Any, processor: Any, file: Path, pictures: Pictures) -> dict[str, Any]:
    """By how much every router prefers an exit, for captions and for questions about objects.

    Nothing has left before the first exit, so one run without exits gives those of every threshold.
    """
    scenes = pictures.scenes()
    never = mmlm.DyVTE(weights_file=str(file), hidden=HIDDEN, threshold=float("inf"))
    asked = [(s, c) for s in scenes[:100] for c in sorted(s.classes)[:2]]
    kinds = {
        "captions": [Request(str(s.index), (_picture(s),), QUESTION) for s in scenes],
        "questions": [
            Request(f"{s.index} {c}", (_picture(s),), f"is there a {c} in the image ?")
            for s, c in asked
        ],
    }
    found: dict[str, Any] = {}
    for kind, requests in kinds.items():
        options = GenerateSettings(max_new_tokens=1, batch_size=50)
        rows, lengths = [], []
        for result in generate_all(model, processor, requests, (never,), options):
            if result.error:
                raise mmlm.errors.MmlmError(f"request {result.id} failed: {result.error}")
            logits = result.measures["dyvte"]["gate_logits"].values()
            rows.append([round(exit - keep, 4) for keep, exit in logits])
        for request in requests[:20]:
            lengths.append(_text_length(processor, request))
        found[kind] = {"margins": rows, "text": round(statistics.mean(lengths))}
    return found


def _text_length(processor: Any, request: Request) -> int:
    """Tokens of a prompt that are no visual ones."""
    from mmlm.inputs import message, prepare

    inputs = prepare(processor, [[message("user", request.prompt, 1)]], [list(request.images)])
    ids = inputs["input_ids"][0]
    return int((ids != processor.image_token_id).sum())


def exits(rows: list[list[float]], threshold: float) -> list[int]:
    """The first layer of each row whose margin exceeds the threshold; the last one if none does."""
    return [
        next((layer for layer, m in enumerate(row) if m > threshold), len(row) - 1) for row in rows
    ]


def saved(
    config: Any, layers: list[int], text: int, visual: int, new: int, *, asked: bool
) -> dict[str, float]:
    """Share of operations that exits after these layers save, in the first pass and afterwards.

    Args:
        config: the decoder's.
        layers: exit of each prompt.
        text: tokens of a prompt without the picture's.
        visual: tokens of a picture.
        new: generated tokens.
        asked: whether routers ran up to the exit.
    """
    count, n = config.num_hidden_layers, text + visual
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


def training_record(run: Path) -> dict[str, Any]:
    """What the training measured: accuracy of every router on unseen rows, and exact labels."""
    from training.exits.labels import ExitRule, exit_shares, read_labels

    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    last = [line for line in log if "eval_exit_share" in line][-1]
    labels = read_labels(run)
    rules = {
        "authors": ExitRule(),
        "ratio 1.1": ExitRule(ratio=1.1),
        "agree 0.9": ExitRule(agree=0.9),
    }
    return {
        "step": last["step"],
        "evaluation": {
            k.removeprefix("eval_"): v for k, v in last.items() if k.startswith("eval_")
        },
        "losses": {line["step"]: line["loss"] for line in log if "loss" in line},
        "harmless": {
            name: {str(layer): share for layer, (_, share) in exit_shares(labels, rule).items()}
            for name, rule in rules.items()
        },
        "judged": len(labels),
    }


def _store(record: dict[str, Any]) -> None:
    """Writes the record whole or not at all, lists of numbers on one line."""
    text = json.dumps(record, indent=1)
    text = re.sub(r"\[[-\d.,\s]+\]", lambda m: re.sub(r"\s+", "", m[0]), text)
    temporary = STORED.with_suffix(".tmp")
    temporary.write_text(text + "\n", encoding="utf-8")
    temporary.replace(STORED)


def run(arguments: argparse.Namespace) -> None:
    """Measures what is missing."""
    model, processor = mmlm.load("embedded")
    config, file = model.config.get_text_config(), arguments.run / "routers.safetensors"
    pictures = Pictures(SPLIT, arguments.images)
    who = {"model": fingerprint(model), "split": SPLIT, "seed": 0, "pictures": arguments.images}
    record: dict[str, Any] = {"identity": who, "settings": {}}
    if STORED.exists():
        stored = json.loads(STORED.read_text(encoding="utf-8"))
        record = stored if stored["identity"] == who else record
    record["information"] = {
        "commit": _commit(), **{name: version(name) for name in ("torch", "transformers")}
    }  # fmt: skip
    record["training"] = training_record(arguments.run)
    if "margins" not in record:
        record["margins"] = margins(model, processor, file, pictures)
        _store(record)
    for name, setting in settings(file, config.num_hidden_layers).items():
        if name in record["settings"]:
            continue
        found = measure(model, processor, setting, pictures)
        if name in DOMINANCE:
            found["dominance"] = dominance(model, processor, setting, pictures)
        record["settings"][name] = found
        _store(record)
        print(f"{name}: {found['seconds']:.0f} s", file=sys.stderr, flush=True)


# ---- tables and figure ----


def _effects(record: dict[str, Any]) -> dict[str, Effect]:
    kinds = {name: Setting(name, name, 0) for name in record["settings"]}
    return {name: Effect(kinds[name], found) for name, found in record["settings"].items()}


def _exit_layers(record: dict[str, Any], name: str, kind: str) -> list[int]:
    """Exits of a setting, prompt by prompt."""
    rows = record["margins"][kind]["margins"]
    if name == PLAIN:
        return [len(rows[0]) - 1] * len(rows)
    if name.startswith("fixed"):
        return [int(name.split()[1])] * len(rows)
    return exits(rows, float(name))


def savings(record: dict[str, Any], name: str, kind: str) -> dict[str, float]:
    """Operations saved by a setting on one kind of prompts, and the mean exit."""
    config = mmlm.load("embedded")[0].config.get_text_config()
    layers = _exit_layers(record, name, kind)
    words = Effect(Setting("", "", 0), record["settings"][PLAIN]).captions.measure("mean_length")
    new = round(words.value or 1) if kind == "captions" else 2
    asked = name != PLAIN and not name.startswith("fixed")
    found = saved(config, layers, record["margins"][kind]["text"], 100, new, asked=asked)
    return {**found, "mean_exit": statistics.mean(layers)}


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def tables(record: dict[str, Any]) -> str:
    """The tables of the page, as Markdown."""
    effects = _effects(record)
    plain = effects[PLAIN]
    head = (
        "exit", "mean exit layer", "operations saved, first pass", "decoding", "CHAIR_s", "CHAIR_i",
        "recall", "POPE random", "popular", "adversarial", "captions changed",
    )  # fmt: skip
    rows = []
    for name, effect in effects.items():
        gain = savings(record, name, "captions")
        label = {PLAIN: "none (plain)"}.get(name, name)
        if name not in (PLAIN,) and not name.startswith("fixed"):
            label = f"routers, threshold {name}"
        cells = [label.replace("fixed", "all after layer")]
        cells += ["" if name == PLAIN else f"{gain['mean_exit']:.2f}"]
        cells += [_percent(gain["first_pass"]), _percent(gain["decoding"])]
        if name == PLAIN:
            values = [
                plain.captions.measure(m).value or 0 for m in ("chair_s", "chair_i", "recall")
            ]
            values += [t.measure("accuracy").value or 0 for t in plain.polls.values()]
            cells += [*map(_percent, values), ""]
        else:
            changes = [difference(plain.captions, effect.captions, m) for m in MEASURES]
            changes += [
                difference(plain.polls[kind], answers, "accuracy")
                for kind, answers in effect.polls.items()
            ]
            cells += [*map(_change, changes), effect.changed(plain)]
        rows.append(cells)
    return "\n\n".join([table(head, rows), _layer_table(record), _dominance_table(record)])


def _change(change: Any) -> str:
    if change.value is None or change.interval is None:
        return "undefined"
    low, high = change.interval.low, change.interval.high
    text = f"{100 * change.value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if change.is_clear else text


def _layer_table(record: dict[str, Any]) -> str:
    """Per layer: how often an exit is harmless, how often its router is right, who exits there."""
    training = record["training"]
    found = training["evaluation"]
    layers = range(len(record["margins"]["captions"]["margins"][0]))
    head = (
        "layer", "exit harmless (labels)", "with ratio 1.1", "router right: keep", "right: exit",
        "captions that exit here", "questions that exit here",
    )  # fmt: skip
    rows = []
    for layer in layers:
        cells = [str(layer)]
        for rule in ("authors", "ratio 1.1"):
            cells.append(_percent(training["harmless"][rule].get(str(layer), 0.0)))
        for what in ("keep", "exit"):
            value = found.get(f"layer_{layer:02}/{what}")
            cells.append("no such label" if value is None else _percent(value))
        for kind in ("captions", "questions"):
            own = _exit_layers(record, "0.0", kind)
            cells.append(_percent(own.count(layer) / len(own)))
        rows.append(cells)
    return table(head, rows)


def _dominance_table(record: dict[str, Any]) -> str:
    """Attention on the picture and text dominance by stage, before and after."""
    head = ("", "MDI early", "middle", "late", "attention on the picture: early", "middle", "late")
    rows = []
    for name in DOMINANCE:
        columns = record["settings"][name]["dominance"]["columns"]
        table_of = _dominance(record["settings"][name]["dominance"])
        cells = ["plain" if name == PLAIN else "routers, threshold 0.0"]
        for metric in ("mdi", "attention_image"):
            for stage in ("early", "middle", "late"):
                value = table_of.measure(f"{metric}_{stage}").value
                cells.append("no picture left" if value is None else f"{value:.2f}")
        assert columns
        rows.append(cells)
    return table(head, rows)


def _dominance(stored: dict[str, Any]) -> Any:
    import numpy as np

    from benchmarks.base import CountTable
    from benchmarks.text_dominance import _metrics

    columns = stored["columns"]
    counts = np.array(list(columns.values()), dtype=np.float64).T
    return CountTable(tuple(columns), tuple(stored["images"]), counts, _metrics())


def figure(record: dict[str, Any]) -> None:
    """Left: labels and routers by layer. Right: what is lost for what is saved."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams["svg.hashsalt"] = "dyvte"
    import matplotlib.pyplot as plt

    fixed, orange, blue = "#CC79A7", "#E69F00", "#0072B2"  # told apart by colour-blind readers
    drawing, (left, middle, right) = plt.subplots(1, 3, figsize=(10.5, 3.1), layout="constrained")
    harmless = record["training"]["harmless"]["authors"]
    layers = sorted(map(int, harmless))
    left.plot(layers, [100 * harmless[str(x)] for x in layers], "o-", color=blue, label="harmless")
    for kind, colour, mark in (("captions", orange, "s--"), ("questions", fixed, "^--")):
        own = _exit_layers(record, "0.0", kind)
        gone = [100 * sum(e <= x for e in own) / len(own) for x in layers]
        left.plot(layers, gone, mark, color=colour, label=f"{kind} that have exited")
    left.set(xlabel="layer", ylabel="% of prompts", ylim=(-3, 103))
    left.legend(fontsize=7)
    effects = _effects(record)
    for axes, metric in ((middle, "chair_i"), (right, "recall")):
        for group, colour, mark in (("fixed", fixed, "^"), ("routers", blue, "o")):
            names = [
                n for n in effects if n != PLAIN and n.startswith("fixed") == (group == "fixed")
            ]
            x = [100 * savings(record, n, "captions")["first_pass"] for n in names]
            y = [100 * (effects[n].captions.measure(metric).value or 0) for n in names]
            axes.plot(x, y, mark, color=colour, label=group if group != "fixed" else "all alike")
        value = 100 * (effects[PLAIN].captions.measure(metric).value or 0)
        axes.axhline(value, color="black", linewidth=0.8, label="plain")
        axes.set(xlabel="% of operations saved, first pass", ylabel=f"{metric.upper()}, %")
        axes.legend(fontsize=7)
    right.set_ylabel("recall, %")
    middle.set_ylabel("CHAIR_i, %")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    drawing.savefig(FIGURE, metadata={"Date": None})
    plt.close(drawing)


def main() -> int:
    """Measures what is missing, then figure and tables."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=RUN, help="folder of the training")
    parser.add_argument("--images", type=int, default=150, help="pictures to caption")
    parser.add_argument("--page", action="store_true", help="only figure and tables")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if not arguments.page:
        run(arguments)
    record = json.loads(STORED.read_text(encoding="utf-8"))
    figure(record)
    print(tables(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
