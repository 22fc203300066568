"""Writes the tables on visual heads in docs/effects.md from what measure_heads.py stored.

    python tools/heads_page.py            rewrite the tables
    python tools/heads_page.py --check    exit code 1 if the page is not up to date

Changes are paired over the pictures, with 95 % bootstrap intervals. The counts of an arm's controls
are pooled: their mean stands for one run.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from effects_page import CAPTIONS, DOCUMENT, Effect, change_cell, difference, load, table_of
from embedded_tables import marked, page_command, table
from measure_heads import TOP, WORDS, Arm, ablated, plain, streamed
from text_control import RATIOS as LANGUAGE

from benchmarks import chair
from benchmarks.base import CountTable

MARKED = marked("heads")
RESAMPLES = 1000
PERCENT, NATS = 100.0, 1.0


class Column(NamedTuple):
    """One number of a setting.

    Attributes:
        head: its name on the page.
        counts: where it comes from.
        metric: its name there.
        factor: from its unit to that of the page.
        digits: behind the point.
    """

    head: str
    counts: CountTable
    metric: str
    factor: float = PERCENT
    digits: int = 1

    def value(self) -> str:
        """The number itself."""
        value = self.counts.measure(self.metric).value
        return "undefined" if value is None else f"{self.factor * value:.{self.digits}f}"

    def against(self, other: Column) -> str:
        """The change from another setting's."""
        change = difference(other.counts, self.counts, self.metric)
        return change_cell(change, self.factor, self.digits)


def caption_columns(effect: Effect) -> list[Column]:
    """What captions show."""
    heads = ("CHAIR_s", "CHAIR_i", "recall", "words", "duplicate sentences")
    return [
        Column(head, effect.captions, name, 1.0 if name == "mean_length" else PERCENT)
        for head, name in zip(heads, CAPTIONS, strict=True)
    ]


def other_columns(effect: Effect) -> list[Column]:
    """Yes/no answers, what is invented, and the language of captions."""
    polls = zip(("POPE random", "popular", "adversarial"), effect.polls.values(), strict=True)
    themes = table_of(effect.record["theme"], chair.THEME_RATIOS)
    language = table_of(effect.record["text_control"], LANGUAGE)
    return [
        *(Column(head, answers, "accuracy") for head, answers in polls),
        Column("says yes", effect.mean_poll, "mean_yes_ratio"),
        Column("invented: of the theme", themes, "theme_share"),
        Column("log-probability of other words", language, "log_probability", NATS, 3),
    ]


def pooled(runs: Sequence[Sequence[Column]]) -> list[Column]:
    """Several settings on the same pictures as one: the mean of their counts."""
    result = []
    for columns in zip(*runs, strict=True):
        first = columns[0].counts
        mean = np.mean([column.counts.counts for column in columns], axis=0)
        counts = CountTable(first.columns, first.images, mean, first.ratios)
        result.append(columns[0]._replace(counts=counts))
    return result


def arms_table(
    arms: Iterable[Arm], columns: Callable[[Effect], list[Column]], first: Sequence[str]
) -> str:
    """Plain decoding in its own numbers; of every arm its change, its controls', and between them.

    Args:
        arms: what was done.
        columns: the numbers of a setting.
        first: heads of the two columns before them.
    """
    (measured,) = load([plain()])
    before = columns(measured)
    rows = [["", "plain", *(column.value() for column in before)]]

    def row(label: str, who: str, after: Sequence[Column], than: Sequence[Column]) -> None:
        cells = [one.against(other) for one, other in zip(after, than, strict=True)]
        rows.append([label, who, *cells])

    for arm in arms:
        if not (found := load([arm.chosen])):
            continue
        chosen = columns(found[0])
        heads = ", ".join(f"{layer}.{head}" for layer, head in arm.heads)
        row(arm.label, f"visual: {heads}" if heads else "none", chosen, before)
        if controls := load(arm.controls):
            drawn = pooled([columns(control) for control in controls])
            row("", f"others: {len(controls)} draws", drawn, before)
            row("", "visual - others", chosen, drawn)
    return table((*first, *(column.head for column in before)), rows)


def ablation() -> str:
    """Ablated heads: captions."""
    return arms_table(ablated(), caption_columns, ("heads, kind", "ablated"))


def ablation_others() -> str:
    """Ablated heads: everything else."""
    return arms_table(ablated(), other_columns, ("heads, kind", "ablated"))


def streaming() -> str:
    """Streaming heads: captions."""
    return arms_table(streamed(), caption_columns, ("heads that see everything", "which"))


def streaming_others() -> str:
    """Streaming heads: everything else."""
    return arms_table(streamed(), other_columns, ("heads that see everything", "which"))


# ---- truth against invention ----


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
        looks = Wins.of(picture, true, data[f"looks {top}"].astype(float))
        rows.append([str(top), cell(visual), cell(control), cell(visual, control), cell(looks)])
    early = Wins.of(picture, true, -data["step"].astype(float))
    rows.append(["none: how early the word stands", cell(early), "", "", ""])
    head = (
        "heads", "visual heads", "other heads of the same layers", "difference",
        "how many visual heads peak on the picture",
    )  # fmt: skip
    counts = f"{int(true.sum())} true and {int((~true).sum())} invented words of {n} captions.\n\n"
    return counts + table(head, rows)


TABLES = {
    make.__name__: make
    for make in (ablation, ablation_others, streaming, streaming_others, invention)
}


def main() -> int:
    """Rewrites or checks the page."""
    return page_command(__doc__, DOCUMENT, MARKED, TABLES)


if __name__ == "__main__":
    sys.exit(main())
