"""Writes the tables of docs/effects.md and its figure from what measure_effects.py stored.

    python tools/effects_page.py            rewrite tables and figure
    python tools/effects_page.py --check    exit code 1 if the page is not up to date

The text between the tables is written by hand. Changes are paired over the pictures, with 95 %
bootstrap intervals; a setting that was measured on fewer pictures is compared on those.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from embedded_tables import MARKED, rewrite, table
from measure_effects import PLAIN, ROOT, Setting, settings

from benchmarks import chair, pope
from benchmarks.base import CountTable
from benchmarks.stats import Difference

DOCUMENT = ROOT / "docs" / "effects.md"
FIGURE = ROOT / "docs" / "images" / "effects.svg"
CAPTIONS = ("chair_s", "chair_i", "recall", "mean_length", "duplicate_sentence_share")
HEAD = (
    "method", "CHAIR_s", "CHAIR_i", "recall", "words", "duplicate sentences",
    "POPE random", "popular", "adversarial", "captions changed",
)  # fmt: skip
STRENGTHS = ("recommended", "first other", "second other")
COLOURS = ("#0072B2", "#E69F00", "#CC79A7")  # Okabe and Ito: told apart by colour-blind readers
MARKERS = ("o", "s", "^")


@dataclass(frozen=True)
class Effect:
    """What one setting gave.

    Attributes:
        setting: the way of decoding.
        record: what `measure_effects.py` stored.
    """

    setting: Setting
    record: dict[str, Any]

    @cached_property
    def captions(self) -> CountTable:
        """Counts of the captions."""
        return table_of(self.record["captions"], chair.METRICS)

    @cached_property
    def polls(self) -> dict[str, CountTable]:
        """Counts of the yes/no answers by kind."""
        metrics = pope.PARSERS["strict"].metrics
        return {kind: table_of(counts, metrics) for kind, counts in self.record["pope"].items()}

    @cached_property
    def mean_poll(self) -> CountTable:
        """The three kinds side by side: metrics are means over them."""
        parts = {kind: pope.PopeResult("strict", kind, (), t) for kind, t in self.polls.items()}
        return pope.summarize(parts).table

    def changed(self, plain: Effect) -> str:
        """How many captions differ from the plain ones."""
        texts = self.record["texts"]
        different = sum(a != b for a, b in zip(texts, plain.record["texts"], strict=False))
        return f"{different} of {len(texts)}"


def load(known: Sequence[Setting] | None = None) -> list[Effect]:
    """The stored ones of some settings (default: all of `make effects`), by method and rank."""
    known = settings() if known is None else known
    order = list(dict.fromkeys(setting.group for setting in known))
    found = [
        Effect(setting, json.loads(setting.path.read_text(encoding="utf-8")))
        for setting in known
        if setting.path.exists()
    ]
    for effect in found:  # two settings whose labels give one file name would share a record
        stored = effect.record["identity"]["setting"]
        if stored != effect.setting.text:
            raise SystemExit(f"{effect.setting.path} is of {stored}, not {effect.setting.text}")
    return sorted(found, key=lambda e: (order.index(e.setting.group), e.setting.rank))


def table_of(counts: dict[str, Any], ratios: Any) -> CountTable:
    """Stored counts, with the metrics that are made of them."""
    columns = counts["columns"]
    return CountTable(
        tuple(columns),
        tuple(counts["images"]),
        np.array(list(columns.values()), dtype=np.float64).T,
        ratios,
    )


def difference(plain: CountTable, other: CountTable, name: str) -> Difference:
    """``other - plain``, on the pictures of ``other``."""
    rows = [plain.images.index(image) for image in other.images]
    same = CountTable(plain.columns, other.images, plain.counts[rows], plain.ratios)
    return same.difference(other, name)


def recommended(effects: Sequence[Effect]) -> str:
    """Every method at its recommended setting."""
    chosen = [e for e in effects if e.setting.rank == 0 and e.setting.group != PLAIN]
    return table(HEAD, [plain_cells(effects[0]), *(_row(effects[0], e) for e in chosen)])


def strengths(effects: Sequence[Effect]) -> str:
    """Every setting."""
    return table(HEAD, [plain_cells(effects[0]), *(_row(effects[0], e) for e in effects[1:])])


TABLES = {make.__name__: make for make in (recommended, strengths)}


def plain_cells(plain: Effect) -> list[str]:
    """Plain decoding, in its own numbers."""
    cells = ["plain"]
    for name in CAPTIONS:
        value = plain.captions.measure(name).value or 0.0
        cells.append(f"{value:.1f}" if name == "mean_length" else f"{100 * value:.1f}")
    accuracies = [t.measure("accuracy").value or 0.0 for t in plain.polls.values()]
    return [*cells, *(f"{100 * value:.1f}" for value in accuracies), ""]


def _row(plain: Effect, effect: Effect) -> list[str]:
    """Changes against plain decoding."""
    label = effect.setting.label
    cells = [label if effect.setting.group == PLAIN else f"`{label}`"]
    for name in CAPTIONS:
        change = difference(plain.captions, effect.captions, name)
        cells.append(change_cell(change, 1 if name == "mean_length" else 100))
    for kind, answers in effect.polls.items():
        cells.append(change_cell(difference(plain.polls[kind], answers, "accuracy"), 100))
    return [*cells, effect.changed(plain)]


def change_cell(change: Difference, factor: float, digits: int = 1) -> str:
    """A change with its interval; bold if the interval leaves 0 out."""
    if change.value is None or change.interval is None:
        return "undefined"
    low, high = (
        _signed(factor * end, digits) for end in (change.interval.low, change.interval.high)
    )
    text = f"{_signed(factor * change.value, digits)} [{low}, {high}]"
    return f"**{text}**" if change.is_clear else text


def _signed(value: float, digits: int) -> str:
    text = f"{value:+.{digits}f}"
    return text if float(text) else text[1:]


def draw(effects: Sequence[Effect], path: Path) -> None:
    """The figure: changes with intervals, one row per method, one panel per number."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    plain, rest = effects[0], [e for e in effects if e.setting.group != PLAIN]
    names = list(dict.fromkeys(e.setting.group for e in rest))
    panels = (
        ("CHAIR_s, points", "chair_s"),
        ("CHAIR_i, points", "chair_i"),
        ("recall, points", "recall"),
        ("POPE accuracy, points", "mean_accuracy"),
        ("words per caption", "mean_length"),
    )
    mpl.rcParams.update({"svg.hashsalt": "mmlm", "font.size": 9, "svg.fonttype": "none"})
    size = (2.3 * len(panels) + 1.2, 0.42 * len(names) + 1.3)
    figure, axes = plt.subplots(1, len(panels), sharey=True, figsize=size, layout="constrained")
    for axis, (title, name) in zip(axes, panels, strict=True):
        axis.axvline(0, color="0.4", linewidth=0.8)
        axis.set_title(title, fontsize=9)
        axis.grid(axis="x", color="0.9")
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        for effect in rest:
            _draw_one(axis, plain, effect, name, names.index(effect.setting.group))
    axes[0].set_yticks(range(len(names)), names)
    axes[0].set_ylim(len(names) - 0.5, -0.5)
    handles = [
        axes[0].plot([], [], marker=marker, color=colour, linestyle="none", label=label)[0]
        for marker, colour, label in zip(MARKERS, COLOURS, STRENGTHS, strict=True)
    ]
    figure.legend(handles=handles, loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _draw_one(axis: Any, plain: Effect, effect: Effect, name: str, row: int) -> None:
    if name == "mean_accuracy":
        change = difference(plain.mean_poll, effect.mean_poll, name)
    else:
        change = difference(plain.captions, effect.captions, name)
    if change.value is None or change.interval is None:
        return
    factor = 1 if name == "mean_length" else 100
    rank = effect.setting.rank
    at = row + 0.22 * (rank - 1)
    ends = [factor * change.interval.low, factor * change.interval.high]
    axis.plot(ends, [at, at], color=COLOURS[rank], linewidth=1.6, solid_capstyle="butt")
    axis.plot(factor * change.value, at, marker=MARKERS[rank], color=COLOURS[rank], markersize=4)


def main() -> int:
    """Rewrites or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    check = parser.parse_args().check
    effects = load()
    differs = rewrite(DOCUMENT, MARKED, lambda name: TABLES[name](effects), check=check)
    if check:
        return differs
    draw(effects, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
