"""NLVR2: is a sentence about two photographs true?

Paper: Suhr et al., "A Corpus for Reasoning about Natural Language Grounded in Photographs", arXiv
1811.00491. The corpus prescribes no prompt, so the prompt is part of the name:

* ``true-false``: the sentence, then "Is this statement about the two images true or false? Answer
  with True or False."; the first word of the reply is compared, anything else is counted.
* ``choice``: the same as a choice between A. True and B. False, read by the first letter; MIA-DPO's
  table treats the benchmark as multiple choice.

Besides accuracy the authors report consistency: the share of sentences judged rightly for all their
picture pairs.
"""

from __future__ import annotations

import csv
import re
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.base import Ratio, Scores
from benchmarks.choices import first_letter
from benchmarks.multi_image.questions import Question, join_answers, make_task
from benchmarks.multi_image.rows import Pictures, Row, read_rows
from benchmarks.multi_image.scoring import Extra, Reading, Scored, answered_lines, score_lines
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    from benchmarks.run import Task

__all__ = [
    "SIZES",
    "SPLITS",
    "Prompt",
    "read_official",
    "read_questions",
    "score_stored",
    "task",
    "write_official",
]

Prompt = Literal["true-false", "choice"]
SIZES = {"dev": 6982, "test1": 6967}
SPLITS = ("test1", "dev")
_PROMPTS = {
    "true-false": "{}\nIs this statement about the two images true or false? "
    "Answer with True or False.",
    "choice": "Is this statement about the two images true or false?\n{}\nA. True\nB. False\n"
    "Answer with the option's letter from the given choices directly.",
}


def read_questions(
    path: Path, pictures: Pictures, split: str = "test1", prompt: Prompt = "true-false"
) -> list[Question]:
    """Reads the corpus: the authors' JSON lines and pictures, or rows with two pictures inside.

    Args:
        path: See `benchmarks.multi_image.rows.read_rows`. Rows have identifier, sentence and label;
            the pictures are in columns named left... and right..., or are files named by the
            identifier (``test1-0-1-img0.png``), in any folder below ``beside``.
        pictures: Where the pictures are or go.
        split: test1 (test-P, 6,967 examples) or dev.
        prompt: How the question is put.

    Raises:
        InputError: If a row lacks a column.
    """
    root = pictures.beside or (path if path.is_dir() else path.parent)
    files = {one.name: one for one in sorted(root.rglob("*-img[01].png"))}
    return [_question(row, pictures, files, prompt) for row in read_rows(path, split)]


def _question(row: Row, pictures: Pictures, files: Mapping[str, Path], prompt: Prompt) -> Question:
    identifier, sentence = row.text("identifier"), row.text("sentence")
    label = str(row.values.get("label")).capitalize()
    if label not in ("True", "False"):
        raise row.refused(f"the label {label!r} is neither True nor False")
    sides = [name for side in ("left", "right") for name in row.values if _is_picture(name, side)]
    if sides:
        shown = pictures.of(row, *sides)
    else:
        pair = identifier.rpartition("-")[0]
        folder = pictures.beside or row.file.parent
        names = [f"{pair}-img{number}.png" for number in (0, 1)]
        shown = tuple(files.get(name) or pictures.find(folder / name) for name in names)
    if len(shown) != 2:
        raise row.refused(f"there are {len(shown)} pictures instead of two")
    return Question(
        id=identifier,
        subject="nlvr2",
        prompt=_PROMPTS[prompt].format(sentence),
        pictures=shown,
        label=label,
        text=sentence,
        facts={"asked": prompt},
    )


def _is_picture(column: str, side: str) -> bool:
    return column.lower().startswith(side) and not column.lower().endswith("url")


def task(
    questions: Sequence[Question], split: str = "test1", prompt: Prompt = "true-false"
) -> Task:
    """The requests."""
    return make_task("nlvr2", split, prompt, questions)


def score_stored(lines: Sequence[Mapping[str, Any]]) -> Scores:
    """Scores stored answers: accuracy, and consistency where the identifiers are the authors'.

    Raises:
        InputError: If a line is damaged, doubled, or of another benchmark, or prompts are mixed.
    """
    asked = {line.get("asked", "answers only") for line in lines}
    if len(asked) > 1:
        raise InputError(
            f"The lines are of several prompts: {', '.join(sorted(asked))}.",
            advice="Score each run by itself.",
        )
    known = all(_sentence(str(line.get("id"))) for line in lines)
    consistency = {"consistency": Ratio(("consistent",), ("sentences",))}
    extra = Extra(consistency, ("sentences", "consistent"), _consistency)
    return score_lines(
        "nlvr2",
        next(iter(asked), ""),
        lines,
        _read,
        macro=False,
        sizes=SIZES,
        official=_official,
        extra=extra if known else None,
    )


def _read(line: Mapping[str, Any]) -> Reading:
    if line.get("asked") == "choice":
        letter = first_letter(line["text"]).letter
        said = {"A": "True", "B": "False"}.get(letter, "")
    else:
        words = re.findall(r"[a-z]+", line["text"].lower())
        said = words[0].capitalize() if words and words[0] in ("true", "false") else ""
    return Reading(said, said == line["label"], "" if said else "no option")


def _sentence(identifier: str) -> str:
    """What is common to the examples of one sentence: everything but the number of the pair."""
    parts = identifier.split("-")
    return "-".join([*parts[:2], parts[3]]) if len(parts) == 4 else ""


def _consistency(scored: Sequence[Scored]) -> dict[str, dict[str, int]]:
    """Counts each sentence once, at its first example."""
    sentences: dict[str, list[tuple[str, bool]]] = {}
    for line, reading in scored:
        examples = sentences.setdefault(_sentence(line["id"]), [])
        examples.append((line["id"], reading.correct))
    return {
        examples[0][0]: {"sentences": 1, "consistent": int(all(right for _, right in examples))}
        for examples in sentences.values()
    }


def _official(scored: Sequence[Scored]) -> dict[str, Any]:
    """What the authors' metrics.py prints."""
    right = [reading.correct for _, reading in scored]
    return {"accuracy": sum(right) / len(right) if right else None}


def write_official(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Writes the predictions that the authors' metrics.py reads: ``identifier,True``.

    A reply without an answer is written as "None", which that script counts as wrong.
    """
    answered, _ = answered_lines("nlvr2", lines)
    rows = [(line["id"], _read({**line, "label": ""}).said or "None") for line in answered]
    with path.open("w", encoding="utf-8", newline="") as stream:
        csv.writer(stream, lineterminator="\n").writerows(rows)


def read_official(
    path: Path, questions: Sequence[Question], split: str = "test1"
) -> list[dict[str, Any]]:
    """Reads such predictions as lines to score.

    Raises:
        InputError: If a row has not two fields, an identifier occurs twice, or the file is not
            about exactly these questions.
    """
    answers: dict[str, str] = {}
    for number, row in enumerate(csv.reader(_text(path).splitlines()), start=1):
        if len(row) != 2 or row[0] in answers:
            problem = "occurs twice" if len(row) == 2 else "has not two fields"
            raise InputError(
                f"{path}, line {number}: {','.join(row)!r} {problem}.",
                advice="It should look like test1-0-1-0,True.",
            )
        answers[row[0]] = row[1]
    lines = join_answers("nlvr2", split, questions, answers)
    return [{**line, "asked": "true-false"} for line in lines]


def _text(path: Path) -> str:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"{path} cannot be read: {error}.", advice="Give a UTF-8 text file."
        ) from error
    if not text.strip():
        raise InputError(f"{path} is empty.", advice="Check that it was written.")
    return text
