"""Writes the tables of docs/effects.md about methods that were trained, from what is stored.

    python tools/model_side_page.py            rewrite the tables
    python tools/model_side_page.py --check    exit code 1 if the page is not up to date

A table stands between `<!-- model side: NAME -->` and `<!-- model side end -->`; the text around is
written by hand. Figures come from the tools that measured.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import dyvte_page
import measure_crosslmm
import measure_mma
from embedded_tables import RESULTS, ROOT, marked, rewrite, table

DOCUMENT = ROOT / "docs" / "effects.md"
MARKED = marked("model side")
#: Conditions of the two prompts in docs/results/dara.json, in words.
PROMPTS = {
    "zero_shot": "query alone",
    "no_image": "words of the demonstration",
    "full": "demonstration and query",
}


def dara(record: Mapping[str, Any]) -> str:
    """Right answers about the second of two pictures, by prompt and model."""
    head = (
        "prompt", "model", "learned numbers", "right, %", "change against plain", "second",
        "first", "attention, layer 0: demo, query", "all layers",
    )  # fmt: skip
    rows = []
    for condition, prompt in PROMPTS.items():
        for model in ("plain", "DARA", "LoRA"):
            arm = record["arms"].get(f"{model}/{condition}")
            if arm is None:
                continue
            learned = "" if model == "plain" else str(record[model]["learning_parameters"])
            change = record["against_plain"].get(model) if condition == "full" else None
            rows.append(
                [
                    prompt,
                    model,
                    learned,
                    f"{_percent(arm['accuracy'])} {_interval(arm['interval'])}",
                    "" if change is None else _change(change),
                    _percent(arm["in_second"]),
                    _percent(arm["in_first"]),
                    *(
                        ", ".join(map(_percent, arm["attention"][where]))
                        if "attention" in arm
                        else ""
                        for where in ("layer_0", "all_layers")
                    ),
                ]
            )
    return table(head, rows)


def dara_tasks(record: Mapping[str, Any]) -> str:
    """The tasks of `mmlm data micl`: the plain model by prompt, and what both arms change."""
    numbers = {
        arm: next(x["learning_parameters"] for n, x in record["learned"].items() if arm in n)
        for arm in ("DARA", "LoRA")
    }
    head = ["task", "zero-shot", "demos without pictures", "demos with wrong answers", "demos"]
    head += [f"{arm}, {count} numbers" for arm, count in numbers.items()]
    tasks = dict.fromkeys(name.rpartition("/")[2] for name in record["accuracy"])
    rows = []
    for task in tasks:
        plain = (
            record["accuracy"][f"plain/{condition}/{task}"]["accuracy"]
            for condition in ("zero_shot", "no_images", "shuffled_labels", "full")
        )
        changes = (_change(record["against_plain"][f"{arm}/{task}"]) for arm in numbers)
        rows.append([task, *map(_percent, plain), *changes])
    return table(head, rows)


#: Name of a table -> the stored record, and what makes the table of it.
TABLES: dict[str, tuple[str, Callable[[Any], str]]] = {
    "dyvte": ("dyvte", dyvte_page.quality),
    "dyvte_layers": ("dyvte", dyvte_page.by_layer),
    "dyvte_dominance": ("dyvte", dyvte_page.dominance),
    "mma": ("mma", measure_mma.results),
    "crosslmm": ("crosslmm", measure_crosslmm.effects),
    "crosslmm_dominance": ("crosslmm", measure_crosslmm.attention),
    "crosslmm_prefill": ("crosslmm", measure_crosslmm.prefill_times),
    "dara": ("dara", dara),
    "dara_tasks": ("dara_micl", dara_tasks),
}


def make(name: str) -> str:
    """One table, from what is stored."""
    stored, function = TABLES[name]
    return function(json.loads((RESULTS / f"{stored}.json").read_text(encoding="utf-8")))


def _percent(value: float) -> str:
    return f"{100 * value:.1f}"


def _interval(ends: list[float]) -> str:
    return f"[{', '.join(map(_percent, ends))}]"


def _change(change: Mapping[str, Any]) -> str:
    """In points; bold where the interval does not hold 0."""
    low, high = change["interval"]
    text = f"{100 * change['change']:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return text if low <= 0 <= high else f"**{text}**"


def main() -> int:
    """Rewrites or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    given = parser.parse_args()
    return rewrite(given.document, MARKED, make, check=given.check)


if __name__ == "__main__":
    sys.exit(main())
