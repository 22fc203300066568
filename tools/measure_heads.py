"""Measures what visual heads of the embedded model are worth, for docs/effects.md.

    mmlm calibrate heads --kind visual --count 128 --output docs/results/visual_heads.json
    python tools/measure_heads.py              everything that is not there yet
    python tools/measure_heads.py --shard 0/2  every second setting, beside a second process

The strongest heads are ablated, they alone see more than the first and latest tokens
(StreamingHeads), and their attention is noted while true and invented objects are named. The
control is as many other heads of the same layers, in several draws. The map of heads is of other
scenes (split train) than everything else (split natural). Every setting is one file under
docs/results/head_ablation or docs/results/streaming_heads, as `measure_effects.py` writes them and
with what `text_control.py` counts; `tools/heads_page.py` makes the tables from the files.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from measure_effects import (
    PLAIN,
    ROOT,
    Setting,
    commit,
    counts,
    identity,
    is_there,
    measure,
    store,
    store_measured,
)
from measure_embedded import QUESTION, SPLIT, Pictures, picture
from text_control import text_control

import mmlm
from mmlm.engine.head_maps import Head, HeadMap, random_heads

MAP = ROOT / "docs" / "results" / "visual_heads.json"
WORDS = ROOT / "docs" / "results" / "head_words.json"
ABLATED = ROOT / "docs" / "results" / "head_ablation"
STREAMED = ROOT / "docs" / "results" / "streaming_heads"
TOP = (1, 2, 5)
"""Of 48 heads: 1 and 2 % are one head, 5 % are two, 10 % are five."""
KINDS = ("zero", "blind")
DRAWS = 5
KEPT = (0, 5, 12)
"""Heads that do not stream: none, 10 and 25 %."""
KEPT_DRAWS = 3
SINK, RECENT = 4, 16
"""The window of streaming heads: behind the question it holds 8 of the 100 image tokens, behind the
seventh word of an answer one, which is among the first."""


@dataclass(frozen=True)
class Named(Setting):
    """A setting whose file has a name of its own: labels leave heads out.

    Attributes:
        folder: of its file.
        name: of its file.
    """

    folder: Path = ABLATED
    name: str = PLAIN

    @property
    def path(self) -> Path:
        """Where the result is stored."""
        return self.folder / f"{self.name}.json"


class Arm(NamedTuple):
    """What is done to some heads, and the same with others.

    Attributes:
        label: what is done.
        heads: the heads, strongest first; streaming: those that do not stream.
        chosen: the setting.
        controls: with as many other heads of the same layers.
    """

    label: str
    heads: tuple[Head, ...]
    chosen: Setting
    controls: tuple[Setting, ...]


def plain() -> Setting:
    """Measured here again: with the counts of `text_control.py`."""
    return Named(PLAIN, PLAIN, 0)


def ablated() -> list[Arm]:
    """The strongest visual heads without an output, and without sight."""
    found = HeadMap.load(MAP)

    def setting(heads: Sequence[Head], kind: str, rank: int) -> Setting:
        method = mmlm.HeadAblation(kind=kind, heads_by_layer=tuple(heads))
        return Named("HeadAblation", method.text, rank, ABLATED, f"{kind}-{_text(heads)}")

    arms = []
    for kind in KINDS:
        for top in TOP:
            heads = found.top(top)
            controls = tuple(setting(drawn, kind, 1) for drawn in draws(found, heads, DRAWS))
            arms.append(Arm(f"{top}, {kind}", heads, setting(heads, kind, 0), controls))
    return arms


def streamed() -> list[Arm]:
    """All heads but the strongest visual ones see the first and the latest tokens only."""
    found = HeadMap.load(MAP)
    everything = {(layer, h) for layer in range(found.shape[0]) for h in range(found.shape[1])}

    def setting(kept: Sequence[Head], rank: int, *, keep_image: bool = False) -> Setting:
        method = mmlm.StreamingHeads(
            sink=SINK,
            recent=RECENT,
            keep_image=keep_image,
            heads_by_layer=tuple(everything - set(kept)),
        )
        name = "image kept" if keep_image else f"kept-{_text(kept) or 'none'}"
        return Named("StreamingHeads", method.text, rank, STREAMED, name.replace(" ", "-"))

    arms = [Arm("0, and the image stays", (), setting((), 0, keep_image=True), ())]
    for number in KEPT:
        kept = found.top(number) if number else ()
        controls = tuple(setting(drawn, 1) for drawn in draws(found, kept, KEPT_DRAWS))
        arms.append(Arm(str(number), kept, setting(kept, 0), controls))
    return arms


def draws(found: HeadMap, heads: Sequence[Head], number: int) -> list[tuple[Head, ...]]:
    """So many different controls, as far as there are; of no heads there is none."""
    if not heads:
        return []
    # Beside one head there are five others in its layer: then all of them are drawn.
    drawn = dict.fromkeys(random_heads(heads, found.shape, seed) for seed in range(40))
    return list(drawn)[:number]


def _text(heads: Sequence[Head]) -> str:
    return "-".join(f"{layer}.{head}" for layer, head in sorted(heads))


def settings() -> Iterator[Setting]:
    """Plain, then arm by arm, each with its controls."""
    yield plain()
    for arm in (*ablated(), *streamed()):
        yield arm.chosen
        yield from arm.controls


def words(model: Any, processor: Any, pictures: Pictures) -> dict[str, Any]:
    """What visual and other heads see of the image, for every object that captions name.

    Per word and number of heads: the largest attention on the image among the visual heads
    (``visual``) and among each draw of others (``control``), and how many of the visual heads have
    their peak on it (``looks``).
    """
    from mmlm.head_measures import Grounded, observed

    found = HeadMap.load(MAP)
    scenes = pictures.scenes()
    samples = (
        # Which words are true is known from the names; regions are not needed.
        Grounded(picture(s), QUESTION, boxes=dict.fromkeys(s.classes, ()))
        for s in scenes
    )
    rows: list[dict[str, Any]] = []
    for scene, one in zip(scenes, observed(model, processor, samples), strict=True):
        masses = np.asarray(one.record["masses"])
        looking = np.asarray(one.record["peaks"]) >= 0
        for word in one.named:
            row = {"picture": scene.index, "true": int(word.true), "step": word.step}
            for top in TOP:
                heads = found.top(top)
                controls = draws(found, heads, DRAWS)
                row[f"visual {top}"] = _most(masses[word.step], heads)
                row[f"looks {top}"] = sum(int(looking[word.step][head]) for head in heads)
                row[f"control {top}"] = [_most(masses[word.step], drawn) for drawn in controls]
            rows.append(row)
    return {
        "identity": identity(model, Setting(PLAIN, PLAIN, 0), pictures),
        "columns": {name: [row[name] for row in rows] for name in rows[0]},
    }


def _most(masses: np.ndarray, heads: Sequence[Head]) -> float:
    return round(float(max(masses[head] for head in heads)), 6)


def main() -> int:
    """Measures what is missing."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=300, help="pictures to caption")
    parser.add_argument("--shard", default="0/1", help="i/n: every n-th setting from the i-th")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    shard, of = (int(part) for part in arguments.shard.split("/"))
    model, processor = mmlm.load("embedded")
    pictures = Pictures(SPLIT, arguments.images)
    if shard == 0 and not is_there(WORDS, identity(model, Setting(PLAIN, PLAIN, 0), pictures)):
        record = words(model, processor, pictures)
        store(WORDS, {**record, "information": {"commit": commit()}})
    for folder in (ABLATED, STREAMED):
        folder.mkdir(exist_ok=True)
    for number, setting in enumerate(settings()):
        who = identity(model, setting, pictures)
        if number % of == shard and not is_there(setting.path, who):
            record = measure(model, processor, setting, pictures)
            control = text_control(model, processor, pictures.scenes(), setting.methods)
            record["text_control"] = counts(control)
            store_measured(setting, who, record, arguments.threads)
    return 0


if __name__ == "__main__":
    sys.exit(main())
