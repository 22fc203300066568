"""Measures what visual heads of the embedded model are worth: ablated, and as a sign of invention.

    mmlm calibrate heads --kind visual --count 128 --output docs/results/visual_heads.json
    python tools/measure_heads.py             everything that is not there yet
    python tools/measure_heads.py --page      rewrite the tables in docs/effects.md
    python tools/measure_heads.py --check     exit code 1 if the tables are not up to date

The map is of other scenes (split train) than everything else (split natural). Records of ablations
are those of `measure_effects.py`; the control of each is as many other heads of the same layers, in
five draws whose counts are pooled. Changes are paired over the pictures, with 95 % bootstrap
intervals.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from effects_page import CAPTIONS, HEAD, Effect, change_cell, difference, load, plain_cells
from embedded_tables import marked, rewrite, table
from measure_effects import (
    PLAIN,
    ROOT,
    Setting,
    commit,
    identity,
    is_there,
    measure,
    store,
    store_measured,
)
from measure_embedded import QUESTION, SPLIT, Pictures

import mmlm
from benchmarks.base import CountTable
from mmlm.engine.head_maps import Head, HeadMap, by_layer, random_heads

DOCUMENT = ROOT / "docs" / "effects.md"
MAP = ROOT / "docs" / "results" / "visual_heads.json"
FOLDER = ROOT / "docs" / "results" / "head_ablation"
WORDS = ROOT / "docs" / "results" / "head_words.json"
MARKED = marked("heads")
TOP = (1, 2)
"""1 and 2 % of 48 heads are one head, 5 % are two."""
DRAWS = 5
RESAMPLES = 1000


@dataclass(frozen=True)
class Ablated(Setting):
    """Some heads ablated; labels leave heads out, so that its file has a name of its own."""

    @property
    def path(self) -> Path:
        """Where the result is stored."""
        (method,) = self.methods
        assert isinstance(method, mmlm.HeadAblation)
        heads = "-".join(f"{layer}.{head}" for layer, own in method.ablated for head in own)
        return FOLDER / f"{method.kind}-{heads}.json"


class Arm(NamedTuple):
    """An ablation and its controls."""

    top: int
    kind: str
    visual: Setting
    controls: tuple[Setting, ...]


def arms() -> list[Arm]:
    """What is ablated: the strongest visual heads, and their controls."""
    found = HeadMap.load(MAP)

    def setting(heads: Sequence[Head], kind: str, rank: int) -> Setting:
        method = mmlm.HeadAblation(kind=kind, heads_by_layer=by_layer(heads))
        return Ablated("HeadAblation", method.text, rank)

    result = []
    for top in TOP:
        heads = found.top(top)
        # Of one head's layer there are five others: then all of them are drawn.
        drawn = dict.fromkeys(random_heads(heads, found.shape, seed) for seed in range(40))
        controls = tuple(setting(chosen, "zero", 1) for chosen in list(drawn)[:DRAWS])
        result.append(Arm(top, "zero", setting(heads, "zero", 0), controls))
        result.append(Arm(top, "blind", setting(heads, "blind", 0), ()))
    return result


def settings() -> Iterator[Setting]:
    """Plain, then the largest number of heads with its controls, and so on."""
    yield Setting(PLAIN, PLAIN, 0)
    for arm in sorted(arms(), key=lambda arm: (-arm.top, arm.kind != "zero")):
        yield arm.visual
        yield from arm.controls


# ---- truth against invention ----


def words(model: Any, processor: Any, pictures: Pictures) -> dict[str, Any]:
    """Attention on the image of visual and of other heads, for every object that captions name."""
    from PIL import Image

    from data_tools.world import render
    from mmlm.head_measures import Grounded, observed

    found = HeadMap.load(MAP)
    scenes = pictures.scenes()
    samples = (
        # Which words are true is known from the names; regions are not needed.
        Grounded(Image.fromarray(render(s).image), QUESTION, boxes=dict.fromkeys(s.classes, ()))
        for s in scenes
    )
    rows: list[dict[str, Any]] = []
    for scene, one in zip(scenes, observed(model, processor, samples), strict=True):
        masses = np.asarray(one.record["masses"])
        for word in one.named:
            row = {"picture": scene.index, "true": int(word.true), "step": word.step}
            for top in TOP:
                heads = found.top(top)
                draws = [random_heads(heads, found.shape, seed) for seed in range(DRAWS)]
                row[f"visual {top}"] = _most(masses[word.step], heads)
                row[f"control {top}"] = [_most(masses[word.step], drawn) for drawn in draws]
            rows.append(row)
    return {
        "identity": identity(model, Setting(PLAIN, PLAIN, 0), pictures),
        "columns": {name: [row[name] for row in rows] for name in rows[0]},
    }


def _most(masses: np.ndarray, heads: Sequence[Head]) -> float:
    return round(float(max(masses[head] for head in heads)), 6)


class Wins(NamedTuple):
    """Per pair of pictures how often a true word of the first beats an invented one of the second.

    Attributes:
        won: [pictures, pictures]; a tie counts half.
        pairs: [pictures, pictures].
    """

    won: np.ndarray
    pairs: np.ndarray

    @classmethod
    def of(cls, picture: np.ndarray, true: np.ndarray, values: np.ndarray) -> Wins:
        """From the words of all pictures; values [words] or [words, draws], whose mean is taken."""
        values = values.reshape(len(values), -1)
        number = np.unique(picture, return_inverse=True)[1]
        good, bad = np.flatnonzero(true), np.flatnonzero(~true)
        above = values[good][:, None] - values[bad][None]
        score = ((above > 0) + 0.5 * (above == 0)).mean(-1)
        n = number.max() + 1
        won, pairs = np.zeros((n, n)), np.zeros((n, n))
        at = number[good][:, None], number[bad][None]
        np.add.at(won, at, score)
        np.add.at(pairs, at, 1.0)
        return cls(won, pairs)

    def auc(self, weights: np.ndarray) -> np.ndarray:
        """Area under the curve for pictures that are drawn ``weights`` times: [draws, pictures]."""
        won = ((weights @ self.won) * weights).sum(-1)
        result: np.ndarray = won / ((weights @ self.pairs) * weights).sum(-1)
        return result


def invention() -> str:
    """The table of areas under the curve."""
    columns = json.loads(WORDS.read_text(encoding="utf-8"))["columns"]
    data = {name: np.asarray(column) for name, column in columns.items()}
    picture, true = data["picture"], data["true"].astype(bool)
    n = len(np.unique(picture))
    drawn = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), RESAMPLES).astype(float)
    everything = np.ones((1, n))

    def cell(one: Wins, other: Wins | None = None) -> str:
        values = [
            w.auc(weights) for weights in (everything, drawn) for w in (one, other) if w is not None
        ]
        whole, many = values if other is None else (values[0] - values[1], values[2] - values[3])
        low, high = np.percentile(many, [2.5, 97.5])
        form = "{:.3f} [{:.3f}, {:.3f}]" if other is None else "{:+.3f} [{:+.3f}, {:+.3f}]"
        text = form.format(float(whole[0]), low, high)
        return f"**{text}**" if other is not None and not low <= 0 <= high else text

    rows = []
    for top in TOP:
        visual = Wins.of(picture, true, data[f"visual {top}"])
        control = Wins.of(picture, true, data[f"control {top}"])
        rows.append([str(top), cell(visual), cell(control), cell(visual, control)])
    early = Wins.of(picture, true, -data["step"].astype(float))
    rows.append(["none: how early the word stands", cell(early), "", ""])
    head = ("heads", "visual heads", "other heads of the same layers", "difference")
    counts = f"{int(true.sum())} true and {int((~true).sum())} invented words of {n} captions.\n\n"
    return counts + table(head, rows)


# ---- ablation ----


def pooled(tables: Sequence[CountTable]) -> CountTable:
    """Several runs on the same pictures as one: the mean of their counts."""
    first = tables[0]
    counts = np.mean([one.counts for one in tables], axis=0)
    return CountTable(first.columns, first.images, counts, first.ratios)


def ablation() -> str:
    """The table of ablated heads: changes against plain, and against the control."""
    plain = load([Setting(PLAIN, PLAIN, 0)])[0]
    rows = [["", *plain_cells(plain)[:-1]]]
    for arm in arms():
        measured = load([arm.visual])
        if not measured:
            continue
        effect = measured[0]
        heads = ", ".join(f"{layer}.{h}" for layer, own in _heads(arm.visual) for h in own)
        rows.append([f"{arm.top}, {arm.kind}", f"visual: {heads}", *_cells(plain, effect)])
        controls = load(arm.controls)
        if not controls:
            continue
        captions = pooled([one.captions for one in controls])
        polls = {kind: pooled([one.polls[kind] for one in controls]) for kind in effect.polls}
        rows.append(["", f"others: {len(controls)} draws", *_changes(plain, captions, polls)])
        rows.append(["", "visual - others", *_against(captions, polls, effect)])
    return table(("heads, kind", "ablated", *HEAD[1:-1]), rows)


def _heads(setting: Setting) -> Any:
    (method,) = setting.methods
    assert isinstance(method, mmlm.HeadAblation)
    return method.ablated


def _cells(plain: Effect, effect: Effect) -> list[str]:
    return _changes(plain, effect.captions, effect.polls)


def _changes(plain: Effect, captions: CountTable, polls: dict[str, CountTable]) -> list[str]:
    return _differences(plain.captions, plain.polls, captions, polls)


def _against(captions: CountTable, polls: dict[str, CountTable], effect: Effect) -> list[str]:
    return _differences(captions, polls, effect.captions, effect.polls)


def _differences(
    before: CountTable,
    asked: dict[str, CountTable],
    after: CountTable,
    answered: dict[str, CountTable],
) -> list[str]:
    cells = [
        change_cell(difference(before, after, name), 1 if name == "mean_length" else 100)
        for name in CAPTIONS
    ]
    for kind, answers in answered.items():
        cells.append(change_cell(difference(asked[kind], answers, "accuracy"), 100))
    return cells


TABLES = {make.__name__: make for make in (ablation, invention)}


def main() -> int:
    """Measures what is missing, or makes the page's tables."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300, help="pictures to caption")
    parser.add_argument("--page", action="store_true", help="only rewrite the tables")
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    if arguments.page or arguments.check:
        return rewrite(DOCUMENT, MARKED, lambda name: TABLES[name](), check=arguments.check)
    torch.set_num_threads(arguments.threads)
    model, processor = mmlm.load("embedded")
    pictures = Pictures(SPLIT, arguments.images)
    if not _words_there(WORDS, model, pictures):
        record = words(model, processor, pictures)
        store(WORDS, {**record, "information": {"commit": commit()}})
    FOLDER.mkdir(exist_ok=True)
    for setting in settings():
        who = identity(model, setting, pictures)
        if not is_there(setting.path, who):
            store_measured(
                setting, who, measure(model, processor, setting, pictures), arguments.threads
            )
    return 0


def _words_there(path: Path, model: Any, pictures: Pictures) -> bool:
    return is_there(path, identity(model, Setting(PLAIN, PLAIN, 0), pictures))


if __name__ == "__main__":
    sys.exit(main())
