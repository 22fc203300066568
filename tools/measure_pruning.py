"""Measures what fewer visual tokens change on the embedded model, for docs/effects.md.

    python tools/measure_pruning.py                          everything that is not there yet
    python tools/measure_pruning.py --methods FlowCut        only these
    python tools/measure_pruning.py --prefill                only the times, of what is there

The settings stand in configs/effects/pruning.yaml. Each is one file under docs/results/pruning:
captions and yes/no answers as in `measure_effects.py`, text dominance while the first 100 pictures
are captioned, and the time of a prefill with its pictures beside a plain one, the two taking turns.
A killed run goes on with the setting that was running. `tools/pruning_page.py` makes the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measure_effects import (
    PLAIN,
    ROOT,
    Setting,
    identity,
    is_there,
    measure,
    store,
    store_measured,
)
from measure_embedded import QUESTION, SPLIT, Pictures, picture

import mmlm
from benchmarks import text_dominance
from mmlm.cli.configs import effect_settings
from mmlm.decoding_settings import GenerateSettings
from mmlm.runner import Request, generate_all

RESULTS = ROOT / "docs" / "results" / "pruning"
DOMINANCE_PICTURES = 100
PREFILL_ROWS, REPEATS = 16, 15


@dataclass(frozen=True)
class PruningSetting(Setting):
    """One way of dropping visual tokens."""

    @property
    def path(self) -> Path:
        """Where the result is stored."""
        return RESULTS / super().path.name


def settings() -> list[PruningSetting]:
    """Plain, then every method at every budget."""
    found = [
        PruningSetting(name, text, rank)
        for name, texts in effect_settings("pruning").items()
        for rank, text in enumerate(texts)
    ]
    found.sort(key=lambda setting: setting.rank)
    return [PruningSetting(PLAIN, PLAIN, 0), *found]


def dominance(model: Any, processor: Any, setting: Setting, pictures: Pictures) -> dict[str, Any]:
    """Text dominance while pictures are captioned: sums of every answer, by column."""
    scenes = pictures.scenes()[:DOMINANCE_PICTURES]
    requests = [Request(str(s.index), (picture(s),), QUESTION) for s in scenes]
    options = GenerateSettings(max_new_tokens=84, batch_size=25)
    methods = (*setting.methods, mmlm.TextDominance())
    lines = []
    for result in generate_all(model, processor, requests, methods, options):
        if result.error:
            raise mmlm.errors.MmlmError(f"request {result.id} failed: {result.error}")
        lines.append({"id": result.id, "text": result.text, **result.measures})
    table = text_dominance.score_stored(lines).table
    columns = [[round(float(x), 6) for x in column] for column in table.counts.T]
    return {
        "images": list(table.images),
        "columns": dict(zip(table.columns, columns, strict=True)),
    }


def prefill(model: Any, processor: Any, setting: Setting, pictures: Pictures) -> dict[str, Any]:
    """Milliseconds of a prefill with its pictures, plain and with the methods by turns."""
    import torch

    scenes = pictures.scenes()[:PREFILL_ROWS]
    content = [{"type": "image"}, {"type": "text", "text": QUESTION}]
    text = processor.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = processor(
        text=[text] * len(scenes),
        images=[[picture(s)] for s in scenes],
        return_tensors="pt",
        padding=True,
        padding_side="left",
    )

    def timed(methods: Sequence[Any]) -> float:
        # Of this process, which others on the machine do not lengthen.
        with torch.no_grad(), mmlm.attach(model, *methods, processor=processor):
            began = time.process_time()
            model(**inputs, use_cache=True, logits_to_keep=1)
            return 1000 * (time.process_time() - began) / torch.get_num_threads()

    timed(()), timed(setting.methods)
    pairs = [(timed(()), timed(setting.methods)) for _ in range(REPEATS)]
    plain, with_method = (statistics.median(side) for side in zip(*pairs, strict=True))
    return {
        "rows": len(scenes),
        "repeats": REPEATS,
        "plain_ms": round(plain, 2),
        "ms": round(with_method, 2),
        "ratio": round(statistics.median(a / b for a, b in pairs), 3),
    }


def main() -> int:
    """Measures what is missing."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", help="names of methods, or plain; default: all")
    parser.add_argument("--images", type=int, default=300, help="pictures to caption")
    parser.add_argument("--again", action="store_true", help="measure again what is there")
    parser.add_argument("--prefill", action="store_true", help="measure stored settings' times")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, processor = mmlm.load("embedded")
    pictures = Pictures(SPLIT, arguments.images)
    RESULTS.mkdir(parents=True, exist_ok=True)
    for setting in settings():
        if arguments.methods and setting.group not in arguments.methods:
            continue
        who = identity(model, setting, pictures)
        if arguments.prefill:
            if setting.path.exists():
                stored = json.loads(setting.path.read_text(encoding="utf-8"))
                stored["prefill"] = prefill(model, processor, setting, pictures)
                store(setting.path, stored)
                print(json.dumps({setting.text: stored["prefill"]}), file=sys.stderr, flush=True)
            continue
        if not arguments.again and is_there(setting.path, who):
            continue
        record = measure(model, processor, setting, pictures)
        record["dominance"] = dominance(model, processor, setting, pictures)
        record["prefill"] = prefill(model, processor, setting, pictures)
        store_measured(setting, who, record, arguments.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
