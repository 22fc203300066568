"""Measures where the embedded model looks while it names objects, for docs/inspect.md.

    python tools/measure_looking.py [--count 300]

Captions of the split `natural` (greedy, 84 new tokens). For every object that a caption names: how
much of the attention was on the picture while its name was written (`mmlm.AttentionMap`, mean over
all layers and heads, mean over its tokens), and for objects that are there which part of that
lay within their outlines. Writes docs/results/looking.json with the counts of every picture.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

import mmlm
from benchmarks import stats
from data_tools.world import NAMES, render
from mmlm.cli.pictures import WORLD_PROMPT
from mmlm.inputs import message, prepare
from mmlm.progress import tracked
from mmlm.runner import GenerateSettings
from mmlm.show import looking
from mmlm.show.truth import Drawn, draw_scene
from mmlm.show.words import pieces
from mmlm.streaming import AnswerStream

ROOT = Path(__file__).resolve().parent.parent
RECORD = ROOT / "docs" / "results" / "looking.json"
SETTINGS = GenerateSettings(max_new_tokens=84)
ARMS = ("none", "VHR(alpha=2.0)", "PAI(alpha=0.2, gamma=1.1)")
#: Per picture and kind of mention: how many, attention on the picture, outlines: how many, the part
#: of the attention within, and the part of the area.
COLUMNS = ("found", "found_share", "invented", "invented_share", "placed", "within", "area")


def main() -> None:
    """Measures all arms."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="pictures")
    count = parser.parse_args().count
    model, processor = mmlm.load("embedded")
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.strip()
    arms = {}
    for text in ARMS:
        methods = () if text == "none" else (mmlm.parse_method(text),)
        rows = [
            counts(model, processor, methods, draw_scene(index=index))
            for index in tracked(range(count), sys.stderr.isatty(), text)
        ]
        arms[text] = {"numbers": numbers(np.asarray(rows)), "rows": rows}
        print(text, json.dumps(arms[text]["numbers"]))
    record = {"commit": commit, "question": WORLD_PROMPT, "count": count, "columns": COLUMNS}
    lines = [f' "{name}": {json.dumps(value)}' for name, value in record.items()]
    for text, arm in arms.items():
        lines.append(f' "{text}": {json.dumps(arm)}')
    RECORD.write_text("{\n" + ",\n".join(lines) + "\n}\n", encoding="utf-8")


def counts(model: Any, processor: Any, methods: Any, drawn: Drawn) -> list[float]:
    """The columns of one picture."""
    inputs = prepare(processor, [[message("user", WORLD_PROMPT, 1)]], [[drawn.image]])
    attached = [*methods, mmlm.AttentionMap()]
    with AnswerStream(model, processor, inputs, attached, SETTINGS) as stream:
        for _ in stream:
            pass
    look = looking.of_stream(stream, [drawn.image])
    found = dict.fromkeys(COLUMNS, 0.0)
    for piece in pieces(look.text, drawn.known.objects):
        if not piece.kind:
            continue
        kind = "found" if piece.kind == "good" else "invented"
        found[kind] += 1
        found[f"{kind}_share"] += look.share_of_span(piece.start, piece.end)
        area = outlines(drawn, piece.name, look.maps[0].shape[1:])
        if piece.kind == "good" and area.any():
            seen = look.of_span(piece.start, piece.end)
            found["placed"] += 1
            found["within"] += float((seen * area).sum() / seen.sum())
            found["area"] += float(area.mean())
    return [round(found[name], 6) for name in COLUMNS]


def outlines(drawn: Drawn, name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Which part of each cell lies within the boxes of a kind of object."""
    side = render(drawn.scene).image.shape[0]
    mask = np.zeros((side, side))
    for one in drawn.scene.instances:
        if NAMES[one.category] == name:
            mask[one.y : one.y + one.height, one.x : one.x + one.width] = 1
    rows, columns = shape
    return mask.reshape(rows, side // rows, columns, side // columns).mean((1, 3))


def numbers(rows: np.ndarray) -> dict[str, Any]:
    """Means over mentions with 95 % bootstrap intervals over pictures."""
    index = {name: i for i, name in enumerate(COLUMNS)}

    def mean(top: str, bottom: str) -> Any:
        def statistic(sums: np.ndarray) -> np.ndarray:
            return stats.ratio(sums[..., index[top]], sums[..., index[bottom]])

        interval = stats.bootstrap_interval(rows, statistic)
        value = float(statistic(rows.sum(0)))
        bounds = None if interval is None else [round(interval.low, 4), round(interval.high, 4)]
        return {"value": round(value, 4), "interval": bounds}

    return {
        "mentions": {name: int(rows[:, index[name]].sum()) for name in ("found", "invented")},
        "attention_found": mean("found_share", "found"),
        "attention_invented": mean("invented_share", "invented"),
        "within_outline": mean("within", "placed"),
        "outline_area": mean("area", "placed"),
    }


if __name__ == "__main__":
    main()
