"""Writes what measure_pruning.py stored into docs/effects.md: two tables and a figure.

    python tools/pruning_page.py            rewrite tables and figure
    python tools/pruning_page.py --check    exit code 1 if the page is not up to date

A table stands between `<!-- pruning: NAME -->` and `<!-- pruning end -->`; the text around is
written by hand. Changes are paired over the pictures, with 95 % bootstrap intervals.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from effects_page import Effect, change_cell, difference, load, plain_cells
from embedded_tables import marked, rewrite, table
from measure_effects import PLAIN, ROOT
from measure_pruning import settings

from benchmarks.base import CountTable, Scores
from benchmarks.text_dominance import _metrics, rebalanced
from mmlm.engine.stages import STAGES

DOCUMENT = ROOT / "docs" / "effects.md"
FIGURE = ROOT / "docs" / "images" / "pruning.svg"
MARKED = marked("pruning")
CAPTIONS = ("chair_s", "chair_i", "recall", "mean_length")
CHANGES = (
    "method", "CHAIR_s", "CHAIR_i", "recall", "words", "POPE random", "popular", "adversarial",
    "prefill",
)  # fmt: skip
DOMINANCE = (
    "method", "visual tokens", "MDI early", "middle", "late", "middle by count alone",
    "A_T middle", "A_O middle", "verdict for the middle",
)  # fmt: skip
COLOURS = {"FlowCut": "#0072B2", "ClsPruner": "#E69F00", "RandomPruner": "#999999"}
MARKERS = {"FlowCut": "o", "ClsPruner": "s", "RandomPruner": "^"}


def effects(found: Sequence[Effect]) -> str:
    """What every setting changes, and how much faster a prefill with its pictures is."""
    plain = found[0]
    values = plain_cells(plain)
    rows = [[*values[:5], *values[6:9], "x1"]]
    for effect in found[1:]:
        cells = [f"`{effect.setting.label}`"]
        for name in CAPTIONS:
            change = difference(plain.captions, effect.captions, name)
            cells.append(change_cell(change, 1 if name == "mean_length" else 100))
        for kind, answers in effect.polls.items():
            cells.append(change_cell(difference(plain.polls[kind], answers, "accuracy"), 100))
        rows.append([*cells, f"x{effect.record['prefill']['ratio']:.2f}"])
    return table(CHANGES, rows)


def dominance(found: Sequence[Effect]) -> str:
    """Text dominance beside what the smaller number of visual tokens does to it by itself."""
    before = _scores(found[0])
    count = _value(before, "image_tokens")
    rows = []
    for effect in found:
        scores = _scores(effect)
        own, mdi = _value(scores, "image_tokens"), _value(before, "mdi_middle")
        plain = effect.setting.group == PLAIN
        rows.append(
            [
                PLAIN if plain else f"`{effect.setting.label}`",
                f"{own:.0f}",
                *(f"{_value(scores, f'mdi_{stage}'):.2f}" for stage in STAGES),
                "" if plain else f"{mdi * own / count:.2f}",
                f"{_value(scores, 'attention_text_middle'):.3f}",
                f"{_value(scores, 'attention_image_middle'):.3f}",
                "" if plain else rebalanced(before, scores)["middle"],
            ]
        )
    return table(DOMINANCE, rows)


TABLES = {make.__name__: make for make in (effects, dominance)}


def _scores(effect: Effect) -> Scores:
    columns = effect.record["dominance"]["columns"]
    counts = np.array(list(columns.values()), dtype=np.float64).T
    images = tuple(effect.record["dominance"]["images"])
    return Scores(
        name="text-dominance",
        table=CountTable(tuple(columns), images, counts, _metrics()),
        directions={},
        good=(),
        samples=[],
    )


def _value(scores: Scores, name: str) -> float:
    return float(scores.table.measure(name).value or 0.0)


def draw(found: Sequence[Effect], path: Path) -> None:
    """The figure: three numbers over how many of 100 visual tokens are kept."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    mpl.rcParams.update({"svg.hashsalt": "mmlm", "font.size": 9, "svg.fonttype": "none"})
    plain = found[0]
    panels = (("CHAIR_i, %", "chair_i"), ("recall, %", "recall"), ("POPE accuracy, %", "accuracy"))
    figure, axes = plt.subplots(1, len(panels), figsize=(9, 2.9), layout="constrained")
    for axis, (title, name) in zip(axes, panels, strict=True):
        axis.axhline(_percent(plain, name), color="0.4", linewidth=0.8, label="all 100")
        for group in dict.fromkeys(e.setting.group for e in found[1:]):
            own = [e for e in found[1:] if e.setting.group == group]
            axis.plot(
                [_kept(e) for e in own],
                [_percent(e, name) for e in own],
                marker=MARKERS[group],
                color=COLOURS[group],
                markersize=4,
                label=group,
            )
        axis.set_title(title, fontsize=9)
        axis.set_xlabel("visual tokens kept of 100")
        axis.grid(color="0.92")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4,
                  frameon=False)  # fmt: skip
    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)


def _kept(effect: Effect) -> int:
    method: Any = effect.setting.methods[0]
    return int(method.budget)


def _percent(effect: Effect, name: str) -> float:
    if name == "accuracy":
        return 100 * float(effect.mean_poll.measure("mean_accuracy").value or 0.0)
    return 100 * float(effect.captions.measure(name).value or 0.0)


def main() -> int:
    """Rewrites or checks the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--document", type=Path, default=DOCUMENT)
    given = parser.parse_args()
    found = load(settings())
    differs = rewrite(given.document, MARKED, lambda name: TABLES[name](found), check=given.check)
    if given.check:
        return differs
    draw(found, FIGURE)
    return 0


if __name__ == "__main__":
    sys.exit(main())
