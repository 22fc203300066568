"""Answers to MMBench in the tables that the authors' evaluation and their server read."""

from __future__ import annotations

import csv
from typing import TYPE_CHECKING, Any

from benchmarks.mmbench.files import MARKS, SHIFT, Edition, read_table
from benchmarks.multi_image.scoring import answered_lines
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

__all__ = ["read_official", "write_official"]

_COLUMNS = ("index", "question", "hint", *MARKS, "answer", "category", "l2-category", "prediction")


def write_official(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes the table that the official evaluation and the server read, with tabs.

    Columns: index, question, hint, A to E, answer, category, l2-category, prediction.
    """
    answered, _ = answered_lines("mmbench", lines, ("problem",))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, delimiter="\t", lineterminator="\n")
        writer.writerow(_COLUMNS)
        for line in answered:
            options = [line["options"].get(letter, "") for letter in MARKS]
            known = (line["label"] or "", line["category"], line["group"], line["text"])
            writer.writerow([line["id"], line["question"], line["hint"], *options, *known])


def read_official(path: Path, edition: Edition) -> list[dict[str, Any]]:
    """Reads such a table, from here or from VLMEvalKit, as lines to score.

    The way is circular if there is a shifted question. Pictures are not in it: the unit of the
    bootstrap is the question then.

    Raises:
        InputError: If a column is missing, or an index is no number.
    """
    rows = read_table(path)
    needed = ("index", "question", "A", "B", "answer", "prediction")
    if missing := [name for name in needed if name not in rows[0]]:
        raise InputError(
            f"{path} has no column {missing[0]!r}; it has {', '.join(rows[0])}.",
            advice="Give a table of predictions, e.g. one that was written for the server.",
        )
    if wrong := [row["index"] for row in rows if not row["index"].isdecimal()]:
        raise InputError(f"{path}: the index {wrong[0]!r} is no number.", advice="Correct it.")
    way = "circular" if any(int(row["index"]) >= SHIFT for row in rows) else "vanilla"
    lines = []
    for row in rows:
        shift, number = divmod(int(row["index"]), SHIFT)
        lines.append(
            {
                "id": row["index"],
                "benchmark": "mmbench",
                "edition": str(edition),
                "way": way,
                "problem": str(number),
                "shift": shift,
                "image": "",
                "question": row["question"],
                "hint": row.get("hint", ""),
                "options": {x: row[x] for x in MARKS if row.get(x, "") not in ("", "nan")},
                "label": row["answer"] or None,
                "category": row.get("category", ""),
                "group": row.get("l2-category", ""),
                "text": row["prediction"],
            }
        )
    return lines
