"""Measures SwapMix on the embedded model, for docs/effects.md.

    python tools/measure_swapmix.py                           plain, VHR, VCD
    python tools/measure_swapmix.py --methods plain
    python tools/measure_swapmix.py --model runs/loop/cdpo/model --name C-DPO --methods plain

Scenes of split `natural`, painted again; greedy. 60 scenes with questions (existence twice, count,
relation), the first 20 of them with captions. Every setting is one file under docs/results/swapmix
with the counts of every scene, written when it is finished; what is there is not measured again.
`tools/swapmix_page.py` makes the tables from the files.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from measure_effects import PLAIN, ROOT, commit, is_there, store

import mmlm
from benchmarks import swapmix
from benchmarks.base import CountTable
from benchmarks.swapmix.captions import WORD_COLUMNS
from mmlm.cli.bench.swapped_pictures import painted_questions
from mmlm.cli.configs import effect_settings
from mmlm.runner import GenerateSettings, fingerprint, generate_all

RESULTS = ROOT / "docs" / "results" / "swapmix"
PICTURES = ROOT / "runs" / "swapmix" / "pictures"
SPLIT = "natural"
SWAPS = 5
KINDS = ("object", "attribute", "noise", "clutter")
PARTS = {"questions": ("existence", "count", "relation"), "captions": ("caption",)}
TOKENS = {"questions": 6, "captions": 84}
"""Of a short answer: what decides it stands in its first words."""
METHODS = (PLAIN, "VHR", "VCD")
BATCH = 60


def measure(
    model: Any,
    processor: Any,
    methods: Sequence[mmlm.Method],
    counts: dict[str, int],
    kinds: Sequence[str] = KINDS,
    parts: Sequence[str] = tuple(PARTS),
) -> dict[str, Any]:
    """The counts of every scene, of questions and of captions."""
    began = time.monotonic()
    record: dict[str, Any] = {}
    for part in parts:
        types = PARTS[part]
        asked = painted_questions(
            PICTURES, SPLIT, 0, counts[part], types=types, kinds=kinds, swaps=SWAPS
        )
        items = swapmix.task(asked, "world").items
        settings = GenerateSettings(batch_size=BATCH, max_new_tokens=TOKENS[part])
        requests = [item.request for item in items]
        results = generate_all(model, processor, requests, methods, settings)
        lines = [
            {"id": result.id, **item.facts, "text": result.text, "error": result.error}
            for item, result in zip(items, results, strict=True)
        ]
        scores = swapmix.score_stored(lines)
        counted = WORD_COLUMNS if part == "captions" else scores.table.columns
        record[part] = _counts(scores.table, counted) | {"statuses": dict(scores.statuses)}
    return record | {"seconds": round(time.monotonic() - began, 1)}


def _counts(table: CountTable, wanted: Sequence[str]) -> dict[str, Any]:
    """Columns of a table in JSON: one list of numbers for each that is not all zeros."""
    columns = {
        name: [round(value, 6) for value in column]
        for name, column in zip(table.columns, table.counts.T.tolist(), strict=True)
        if name in wanted and any(column)
    }
    numbers = {n: [int(v) if v == int(v) else v for v in c] for n, c in columns.items()}
    return {"images": list(table.images), "columns": numbers}


def identity(
    model: Any, setting: str, counts: dict[str, int], kinds: Sequence[str]
) -> dict[str, Any]:
    """Everything that determines the counts but the code."""
    return {
        "setting": setting,
        "model": fingerprint(model),
        "split": SPLIT,
        "pictures": counts["questions"],
        "captioned": counts["captions"],
        "swaps": SWAPS,
        "kinds": list(kinds),
    }


def path_of(name: str) -> Path:
    """Where the result of a setting is stored."""
    return RESULTS / f"{name}.json"


def main() -> int:
    """Measures what is missing."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--name", default="", help="name of another model's result")
    parser.add_argument("--scenes", type=int, default=60)
    parser.add_argument("--captioned", type=int, default=20, help="0: no captions")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--again", choices=PARTS, help="measure this part of what is there again")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = mmlm.load(arguments.model)
    counts = {"questions": arguments.scenes, "captions": arguments.captioned}
    RESULTS.mkdir(parents=True, exist_ok=True)
    for group in arguments.methods:
        text = PLAIN if group == PLAIN else effect_settings("embedded")[group][0]
        methods = () if group == PLAIN else (mmlm.parse_method(text),)
        path = path_of(arguments.name or group)
        who = identity(model, text, counts, arguments.kinds)
        known = is_there(path, who)
        if known and not arguments.again:
            continue
        parts = [arguments.again] if known else [part for part in PARTS if counts[part]]
        stored = json.loads(path.read_text("utf-8")) if known else {}
        record = stored | measure(model, processor, methods, counts, arguments.kinds, parts)
        versions = {name: version(name) for name in ("torch", "transformers")}
        information = {"commit": commit(), "threads": arguments.threads, **versions}
        store(path, {"identity": who} | record | {"information": information})
        print(f"{text}: {record['seconds']:.0f} s", file=sys.stderr, flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
