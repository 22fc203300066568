"""Composed records of random pictures, without the stage that composes them."""

from __future__ import annotations

import tiny
from PIL import Image

from data_tools.mia.layouts import draw_grid, draw_inset, grid, inset


def records(root, *wanted):
    """One record per (format, number of pictures); pictures are written under ``root``."""
    return [_record(root, number, *one) for number, one in enumerate(wanted)]


def _record(root, number, kind, n):
    pictures = [tiny.picture(100 * number + i, (70 + 4 * i, 60)) for i in range(n)]
    target = n if kind == "pip" else 1 + number % n
    tiles = []
    if kind == "sequence":
        shown = pictures
    elif kind == "grid":
        layout = grid(n, (60, 60), 12)
        shown, tiles = [draw_grid(pictures, layout)], [list(box) for box in layout.boxes]
    else:
        outer = pictures[0].resize((120, 120), Image.Resampling.NEAREST)
        place = inset(pictures[1].size, outer.size)
        shown = [draw_inset(pictures[1], outer, place)]
        tiles = [[0, 0, *outer.size], list(place.box)]
    names = [f"{number}-{i}.png" for i in range(len(shown))]
    for name, picture in zip(names, shown, strict=True):
        picture.save(root / name)
    return {
        "id": f"{number}-{kind}{n}",
        "format": kind,
        "n_images": n,
        "images": names,
        "target_index": target,
        "tiles": tiles,
        "source_images": [f"source{i}.png" for i in range(n)],
        "question": "What is shown here?",
        "prompt_segments": _segments(kind, n, target),
        "answer": "a cat",
        "seed": 7,
        "source": "tests",
    }


def _segments(kind, n, target):
    asked = {"type": "text", "text": f"In Image{target}, what is shown here?"}
    if kind != "sequence":
        return [{"type": "image"}, asked]
    parts = []
    for i in range(n):
        start = "" if i == 0 else "\n"
        parts += [{"type": "text", "text": f"{start}Image{i + 1}:"}, {"type": "image"}]
    return [*parts, {"type": "text", "text": f"\n{asked['text']}"}]
