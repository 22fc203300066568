"""Measures what an early exit of visual tokens changes on the embedded model (docs/effects.md).

    python tools/measure_dyvte.py                everything that is not there yet
    python tools/measure_dyvte.py --at-most 2    the next two settings

The routers come from `mmlm train --config train/world/dyvte` (its file says how the data is made).
Measured are plain decoding, an exit after each layer for every prompt alike (`DyVTE.fixed`, what
routers have to beat), and the routers at several thresholds: captions, yes/no questions, text
dominance, and the exits with the operations that they save. Every setting is stored as soon as it
is finished; a killed run goes on with the one that was running. Scenes: the split `natural`.
`tools/dyvte_page.py` makes tables and figure.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure_effects import PLAIN, ROOT, Setting, commit, measure, store
from measure_embedded import CLASSES_ASKED, QUESTION, SPLIT, Pictures, picture
from measure_pruning import dominance

import mmlm
from data_tools.world.export import file_name
from data_tools.world.polling import poll
from mmlm.runner import GenerateSettings, Request, fingerprint, generate_all

STORED = ROOT / "docs" / "results" / "dyvte.json"
RUN = ROOT / "runs" / "world" / "dyvte"
HIDDEN = 256
LAYERS = 8
QUESTIONS = 200
"""Yes/no questions whose exits are looked at."""
THRESHOLDS = (0.0, -1.0, -2.0, 1.0)
DOMINANCE = ("plain", "0.0", "fixed 3")
"""Settings whose text dominance is measured: plain, the routers, and an exit for all prompts."""


def router_text(file: Path, threshold: float) -> str:
    """The routers as a method's text form."""
    return f"DyVTE(weights_file={str(file)!r}, hidden={HIDDEN}, threshold={threshold})"


def settings(file: Path, n_layers: int) -> dict[str, Setting]:
    """Name -> way of decoding. An exit after the last layer is plain decoding."""
    found = {PLAIN: Setting(PLAIN, PLAIN, 0)}
    for threshold in THRESHOLDS:
        found[str(threshold)] = Setting("DyVTE", router_text(file, threshold), 0)
    for layer in reversed(range(n_layers - 1)):
        found[f"fixed {layer}"] = Setting("DyVTE", f"DyVTE(exit_layer={layer})", 1)
    return found


def margins(model: Any, processor: Any, file: Path, pictures: Pictures) -> dict[str, Any]:
    """By how much every router prefers an exit, for captions and for questions about objects.

    Nothing has left before the first exit, so one run without exits gives those of every threshold.
    """
    scenes = pictures.scenes()
    never = mmlm.DyVTE(weights_file=str(file), hidden=HIDDEN, threshold=float("inf"))
    drawn = {file_name(s.index): picture(s) for s in scenes if len(s.classes) >= CLASSES_ASKED}
    known = [(s, file_name(s.index)) for s in scenes if file_name(s.index) in drawn]
    asked = poll("random", known)[:QUESTIONS]
    kinds = {
        "captions": [Request(str(s.index), (picture(s),), QUESTION) for s in scenes],
        "questions": [
            Request(f"{q['image']} {q['text']}", (drawn[q["image"]],), q["text"]) for q in asked
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


def training_record(run: Path) -> dict[str, Any]:
    """What the training measured: accuracy of every router on unseen rows, and exact labels."""
    from training.exits.labels import ExitRule, exit_shares, read_labels

    log = [json.loads(line) for line in (run / "log.jsonl").read_text("utf-8").splitlines()]
    last = [line for line in log if "eval_exit_share" in line][-1]
    labels = read_labels(run)
    kinds = {
        kind: {key: one for key, one in labels.items() if kind.removesuffix("s") in key[0]}
        for kind in ("captions", "questions")
    }
    ways = {
        "captions": (kinds["captions"], ExitRule()),
        "questions": (kinds["questions"], ExitRule()),
        "questions, ratio 1.1": (kinds["questions"], ExitRule(ratio=1.1)),
    }
    return {
        "step": last["step"],
        "evaluation": {
            k.removeprefix("eval_"): v for k, v in last.items() if k.startswith("eval_")
        },
        "losses": {line["step"]: line["loss"] for line in log if "loss" in line},
        "harmless": {
            name: {str(layer): share for layer, (_, share) in exit_shares(given, rule).items()}
            for name, (given, rule) in ways.items()
        },
        "judged": len(labels),
    }


def run(arguments: argparse.Namespace) -> None:
    """Measures what is missing."""
    model, processor = mmlm.load("embedded")
    file = arguments.run / "routers.safetensors"
    pictures = Pictures(SPLIT, arguments.images)
    who = {"model": fingerprint(model), "split": SPLIT, "seed": 0, "pictures": arguments.images}
    record: dict[str, Any] = {"identity": who, "settings": {}}
    if STORED.exists():
        stored = json.loads(STORED.read_text(encoding="utf-8"))
        record = stored if stored["identity"] == who else record
    record["information"] = {
        "commit": commit(), **{name: version(name) for name in ("torch", "transformers")}
    }  # fmt: skip
    record["training"] = training_record(arguments.run)
    if "margins" not in record:
        record["margins"] = margins(model, processor, file, pictures)
        store(STORED, record)
    known = settings(file, LAYERS)
    missing = [name for name in known if name not in record["settings"]]
    for name in missing[: arguments.at_most]:
        setting = known[name]
        found = record["settings"][name] = measure(model, processor, setting, pictures)
        store(STORED, record)
        print(f"{name}: {found['seconds']:.0f} s", file=sys.stderr, flush=True)
    for name in DOMINANCE:
        found = record["settings"].get(name)
        if found is not None and "dominance" not in found:
            found["dominance"] = dominance(model, processor, known[name], pictures)
            store(STORED, record)


def main() -> int:
    """Measures what is missing."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=RUN, help="folder of the training")
    parser.add_argument("--images", type=int, default=80, help="pictures to caption")
    parser.add_argument("--at-most", type=int, help="settings to measure now; default: all")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    run(arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
