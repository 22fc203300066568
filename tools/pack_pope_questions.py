"""Packs POPE's published question files into the one table that ships with the benchmarks.

    python tools/pack_pope_questions.py FOLDER

FOLDER holds the files of github.com/AoiDragon/POPE (``output/*/*_pope_*.json``, of the current and
of the first commit) under any names, as JSON lines, plain or gzipped. Each is told by its content.
The version ``coco-2023-10`` is left out: it is ``coco-2023-11`` with 57 misspellings.
"""

from __future__ import annotations

import json
import lzma
import sys
from pathlib import Path

from benchmarks.pope.questions import KINDS, VERSIONS, Question, read_questions, recognise

TARGET = Path(__file__).parents[1] / "benchmarks" / "data" / "pope_questions.json.xz"


def main() -> None:
    """Reads, checks that nothing is missing, writes."""
    found: dict[tuple[str, str], list[Question]] = {}
    for path in sorted(Path(sys.argv[1]).iterdir()):
        if ".json" in path.name and (known := recognise(questions := read_questions(path))):
            if [question.question_id for question in questions] != list(
                range(1, len(questions) + 1)
            ):
                sys.exit(f"{path}: the question ids are not 1, 2, 3, ...")
            found[known] = questions
    wanted = [(version, kind) for version in VERSIONS for kind in KINDS]
    if missing := [" ".join(one) for one in wanted if one not in found]:
        sys.exit(f"not found: {', '.join(missing)}")
    table = {
        version: {
            kind: [[q.image, q.text, q.label] for q in found[version, kind]] for kind in KINDS
        }
        for version in VERSIONS
    }
    raw = json.dumps(table, separators=(",", ":")).encode()
    TARGET.write_bytes(lzma.compress(raw, preset=9 | lzma.PRESET_EXTREME))
    print(f"{TARGET}: {len(raw)} -> {TARGET.stat().st_size} bytes")


if __name__ == "__main__":
    main()
