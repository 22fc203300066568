"""SENTINEL's pairs of sentences, put together into pairs of whole captions: the loop's ablation.

C-DPO learns from two sentences behind one context. Plain DPO learns from two whole captions. To
compare the objectives and not the data, the captions here are made of the very sentences of the
pairs: behind one another stand, for the better caption, the sentences that won, for the worse one
those that lost; where a step has no pair, both have the sentence that extended the context there.
Every pair stands in exactly one row, the number of its step decides in which. The rows have no
context: all of both captions is scored, and both end the turn.

(The same pairs with the context merely moved into both answers would be no ablation: what both
answers share cancels in the sigmoid loss, and C-DPO's gradient would come out again.)
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mmlm.records import read_lines

__all__ = ["whole_captions", "write"]


def write(pairs: Path, output: Path) -> None:
    """Writes the rows of a run of ``mmlm data sentinel``.

    Args:
        pairs: folder of the run.
        output: JSON lines; pictures are relative to its folder.
    """
    by_picture: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for pair in read_lines(pairs / "pairs.jsonl"):
        by_picture[pair["image_id"]].append(pair)
    relative = pairs.relative_to(output.parent)
    lines = [
        row | {"images": [str(relative / image) for image in row["images"]]}
        for picture in read_lines(pairs / "images.jsonl")
        for row in whole_captions(picture, by_picture[picture["image_id"]])
    ]
    temporary = output.with_suffix(".tmp")
    temporary.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    temporary.replace(output)


def whole_captions(
    picture: Mapping[str, Any], pairs: list[Mapping[str, Any]]
) -> Iterator[dict[str, Any]]:
    """The rows of one picture.

    Args:
        picture: its line of ``images.jsonl``.
        pairs: its lines of ``pairs.jsonl``.
    """
    rows: dict[int, dict[int, Mapping[str, Any]]] = defaultdict(dict)
    for pair in pairs:
        step, number = map(int, pair["id"].rsplit("-", 2)[1:])
        rows[number][step] = pair
    for number, own in sorted(rows.items()):
        answers = {
            side: " ".join(_sentences(picture["steps"], own, side))
            for side in ("chosen", "rejected")
        }
        yield {
            "id": f"{picture['image_id']}-whole-{number}",
            "images": [picture["path"]],
            "question": picture["question"],
            "context": "",
            **answers,
            "is_final": True,
            "pairs": len(own),
        }


def _sentences(
    steps: list[Mapping[str, Any]], own: Mapping[int, Mapping[str, Any]], side: str
) -> Iterator[str]:
    for step, candidates in enumerate(steps):
        if step in own:
            yield own[step][side]
        elif candidates["next"] is not None:
            yield candidates["candidates"][candidates["next"]]["text"]
