"""Does the embedded model read several pictures? It was trained on one at a time.

    mmlm data mia run --config data/world_mia --output mia
    python tools/mia_world_reading.py mia --output docs/results/mia_world.json

Takes the questions "is there an X in the image?" of a run over scenes of the embedded world, whose
truth is known, and counts how often the model says yes if X is in the picture that was meant, only
in another one, or in none. A model that ignores which picture was meant says yes equally often in
the first two cases. *alone* is the same question about the target by itself.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import mmlm
from data_tools.mia.records import ANSWER, COMPOSE, SCORE, joined, locate
from mmlm.runner import GenerateSettings, Request, generate_all

QUESTION = re.compile(r"is there an? (.+?) in the image ?\?")
PLACES = ("in the target", "only in another", "in none")


def objects_by_picture(world: Path) -> dict[str, set[str]]:
    """Names of the objects in every picture of a world, by file name."""
    truth = json.loads((world / "instances.json").read_text(encoding="utf-8"))
    names = {one["id"]: one["name"] for one in truth["categories"]}
    files = {one["id"]: one["file_name"] for one in truth["images"]}
    found: dict[str, set[str]] = {Path(name).name: set() for name in files.values()}
    for one in truth["annotations"]:
        found[Path(files[one["image_id"]]).name].add(names[one["category_id"]])
    return found


def place_of(record: Mapping[str, Any], objects: Mapping[str, set[str]]) -> str | None:
    """Where the object of a yes/no question is; None for any other question."""
    match = QUESTION.search(record["question"].lower())
    if match is None:
        return None
    holds = [match[1] in objects[Path(path).name] for path in record["source_images"]]
    if holds[record["target_index"] - 1]:
        return PLACES[0]
    return PLACES[1] if any(holds) else PLACES[2]


def alone(records: Iterable[Mapping[str, Any]], root: Path) -> dict[str, bool]:
    """Whether the model says yes about the target by itself."""
    model, processor = mmlm.load()
    requests = [
        Request(
            record["id"],
            (locate(root, record["source_images"][record["target_index"] - 1]),),
            record["question"],
        )
        for record in records
    ]
    settings = GenerateSettings(max_new_tokens=16, batch_size=32)
    results = generate_all(model, processor, requests, settings=settings)
    return {result.id: result.text.startswith("yes") for result in results}


def rows(root: Path) -> list[dict[str, Any]]:
    """One row per format and number of pictures."""
    objects = objects_by_picture(root / "world")
    groups: dict[tuple[str, int], list[dict[str, Any]]] = defaultdict(list)
    for record in joined(root, (COMPOSE, ANSWER, SCORE)):
        groups[record["format"], record["n_images"]].append(record)
    return [_row(*key, groups[key], objects, root) for key in sorted(groups)]


def _row(
    kind: str, n: int, records: list[dict[str, Any]], objects: Mapping[str, set[str]], root: Path
) -> dict[str, Any]:
    placed = {record["id"]: place_of(record, objects) for record in records}
    asked = [record for record in records if placed[record["id"]]]
    by_itself = alone(asked, root)
    found: dict[str, Any] = {}
    for place in PLACES:
        own = [record for record in asked if placed[record["id"]] == place]
        yes = sum(record["response"].startswith("yes") for record in own)
        found[place] = {
            "questions": len(own),
            "yes": yes,
            "yes_alone": sum(by_itself[record["id"]] for record in own),
        }
    scored = [record for record in records if record["ratio"] is not None]
    others = [
        statistics.mean(r for i, r in enumerate(one["ratios"]) if i != one["target_index"] - 1)
        for one in scored
    ]
    return {
        "format": kind,
        "n_images": n,
        "records": len(records),
        "mean_ratio": round(statistics.mean(record["ratio"] for record in scored), 4),
        "mean_ratio_of_another": round(statistics.mean(others), 4),
        "by_place": found,
    }


def main(argv: list[str] | None = None) -> int:
    """Counts, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("root", type=Path, help="output folder of mmlm data mia")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    found = rows(options.root)
    for row in found:
        print(f"{row['format']} of {row['n_images']}: ratio {row['mean_ratio']}, {row['by_place']}")
    if options.output:
        record = {"command": "python tools/mia_world_reading.py", "rows": found}
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
