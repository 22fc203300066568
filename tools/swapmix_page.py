"""Writes the tables on SwapMix in docs/effects.md from what measure_swapmix.py stored.

    python tools/swapmix_page.py            rewrite the tables
    python tools/swapmix_page.py --check    exit code 1 if the page is not up to date

Changes are paired over the scenes, with 95 % bootstrap intervals; a setting that was measured on
fewer scenes is compared on those.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from effects_page import change_cell, difference
from embedded_tables import marked, rewrite, table
from measure_effects import PLAIN, ROOT
from measure_swapmix import RESULTS

from benchmarks.base import CountTable, Ratio
from benchmarks.swapmix import READERS, captions
from benchmarks.swapmix.counts import RATIOS
from mmlm.cli.configs import effect_label

DOCUMENT = ROOT / "docs" / "effects.md"
MARKED = marked("swapmix")
QUESTIONS = {
    "accuracy": "accuracy",
    "effective_accuracy": "effective accuracy",
    "context_reliance": "context reliance",
    "object_reliance": "of object swaps",
    "attribute_reliance": "of attribute swaps",
    "near_flip_rate": "near swaps that flip",
    "far_flip_rate": "far swaps that flip",
    "clutter_reliance": "clutter reliance",
}
BY_TYPE = {
    "accuracy": "accuracy",
    "context_reliance": "context reliance",
    "flip_rate": "flip rate",
    "noise_flip_rate": "of noise alone",
    "clutter_reliance": "clutter reliance",
}
CAPTIONS = {
    "lost_words": "words lost",
    "noise_lost_words": "by noise alone",
    "gained_words": "inventions gained",
    "noise_gained_words": "by noise alone",
}

Record = Mapping[str, Any]


def counts(stored: Record, ratios: Mapping[str, Ratio]) -> CountTable:
    """The stored counts of every scene; a column that was all zeros is not stored."""
    names = {n for ratio in ratios.values() for n in (*ratio.numerator, *ratio.denominator)}
    images = tuple(stored["images"])
    columns = [stored["columns"].get(name, [0] * len(images)) for name in sorted(names)]
    return CountTable(tuple(sorted(names)), images, np.array(columns, dtype=np.float64).T, ratios)


def _rows(records: Sequence[Record], part: str, ratios: Mapping[str, Ratio]) -> list[list[str]]:
    """Plain decoding in its own numbers, then changes against it."""
    plain = counts(records[0][part], ratios)
    rows = [["plain", *(_value(plain, name) for name in ratios)]]
    for record in records[1:]:
        if part not in record:
            continue
        other = counts(record[part], ratios)
        scenes = f"{len(other.images)} scenes" if len(other.images) < len(plain.images) else ""
        cells = [change_cell(difference(plain, other, name), 100) for name in ratios]
        rows.append([" ".join(filter(None, (_label(record), scenes))), *cells])
    return rows


def _label(record: Record) -> str:
    text = record["identity"]["setting"]
    return str(record["name"]) if text == PLAIN else f"`{effect_label(text)}`"


def _value(of: CountTable, name: str) -> str:
    measure = of.measure(name, resamples=1000)
    if measure.value is None or measure.interval is None:
        return "undefined"
    low, high = 100 * measure.interval.low, 100 * measure.interval.high
    return f"{100 * measure.value:.1f} [{low:.1f}, {high:.1f}]"


def questions(records: Sequence[Record]) -> str:
    """What every setting changes for the answers to questions."""
    ratios = {name: RATIOS[name] for name in QUESTIONS}
    return table(["setting", *QUESTIONS.values()], _rows(records, "questions", ratios))


def types(records: Sequence[Record]) -> str:
    """Plain decoding, all questions and by type."""
    rows = []
    for kind in ("all", *READERS):
        known = {n: r if kind == "all" else r.prefixed(kind) for n, r in RATIOS.items()}
        ratios = {name: known[name] for name in BY_TYPE}
        per = known["swaps_per_question"]
        of = counts(records[0]["questions"], {**ratios, "swaps": per})
        right = int(of.measure("swaps").denominator)
        swaps = of.measure("swaps").value or 0.0
        cells = [_value(of, name) for name in ratios]
        rows.append([kind, str(right), f"{swaps:.0f}", *cells])
    return table(["questions", "right answers", "swaps each", *BY_TYPE.values()], rows)


def words(records: Sequence[Record]) -> str:
    """What every setting changes for the words of captions."""
    ratios = {name: captions.RATIOS[name] for name in CAPTIONS}
    return table(["setting", *CAPTIONS.values()], _rows(records, "captions", ratios))


TABLES = {make.__name__: make for make in (types, questions, words)}


def load() -> list[Record]:
    """The stored results, plain decoding first."""
    found = [
        {"name": path.stem} | json.loads(path.read_text("utf-8"))
        for path in sorted(RESULTS.glob("*.json"))
    ]
    return sorted(found, key=lambda record: str(record["name"]) != PLAIN)


def main() -> int:
    """Rewrites or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    given = parser.parse_args()
    records = load()
    return rewrite(given.document, MARKED, lambda name: TABLES[name](records), check=given.check)


if __name__ == "__main__":
    sys.exit(main())
