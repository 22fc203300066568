"""MME, hallucination subset: the same picture asked twice, once for yes and once for no.

Paper: Fu et al., "MME: A Comprehensive Evaluation Benchmark for Multimodal Large Language Models",
arXiv 2306.13394. The hallucination subset is the four categories existence, count, position and
color. Each picture has two questions. A category scores 100 x accuracy (share of questions answered
rightly) + 100 x accuracy+ (share of pictures with both questions answered rightly), at most 200;
the subset at most 800.

Answering yes to everything earns 50 + 0 points per category: accuracy alone would hide it. A
category is about 30 pictures, so one picture is worth 3 to 7 points. The unit of the bootstrap is
the picture.

Answers are read by the rule of lmms-eval, which took it from Otter (`read_yes_no`): lower-case,
stripped, full stops removed; then exactly yes or no, a single letter y or n, or whichever of the
two words the first four characters contain. "Not sure" is a no by this rule.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.base import CountTable, Ratio, Sample, Scores
from benchmarks.mme.files import (
    CATEGORIES,
    Question,
    read_official,
    read_questions,
    write_official,
)
from benchmarks.run import Item, Task
from benchmarks.stored import answer_text, check_ids, check_texts
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.base import Direction

__all__ = [
    "CATEGORIES",
    "PROMPTS",
    "Question",
    "read_official",
    "read_questions",
    "read_yes_no",
    "score_stored",
    "task",
    "write_official",
]

OFFICIAL_ENDING = "Please answer yes or no."
"""How every question of the official files ends."""
PROMPTS = ("official", "llava")
"""`official`: the question as it is; `llava`: LLaVA's and lmms-eval's ending instead."""


def task(questions: Sequence[Question], prompt: str = "official") -> Task:
    """The questions as requests.

    Args:
        questions: The questions.
        prompt: A name in `PROMPTS`.

    Raises:
        ValueError: If the prompt is unknown.
        InputError: If there are no questions.
    """
    if prompt not in PROMPTS:
        raise ValueError(f"Unknown prompt {prompt!r}; there are: {', '.join(PROMPTS)}.")
    if not questions:
        raise InputError("There are no questions to ask.", advice="Give at least one.")
    items = tuple(
        Item(
            Request(question.id, (question.path,), _prompt(question.text, prompt)),
            {
                "category": question.category,
                "image": question.image_name,
                "question": question.text,
                "label": question.label,
            },
        )
        for question in questions
    )
    return Task("mme/hallucination", items)


def _prompt(text: str, prompt: str) -> str:
    if prompt == "official":
        return text
    plain = text.replace(OFFICIAL_ENDING, "").strip()
    return f"{plain}\nAnswer the question using a single word or phrase."


def read_yes_no(answer: str) -> str | None:
    """Reads an answer as "yes" or "no"; None for neither, which counts as wrong."""
    text = answer.lower().strip().replace(".", "")
    if len(text) == 1:
        return {"y": "yes", "n": "no"}.get(text)
    beginning = text[:4]  # "yes" and "no" themselves included
    return "yes" if "yes" in beginning else "no" if "no" in beginning else None


def score_stored(lines: Sequence[Mapping[str, Any]]) -> Scores:
    """Scores the lines that `mmlm bench mme` stores: id, category, image, question, label, text.

    A picture of which an answer failed is left out whole, because accuracy+ needs both; such
    pictures are counted.

    Raises:
        InputError: If a line lacks a field, an id occurs twice, a picture does not have two
            questions, a category is unknown, or no picture is left.
    """
    check_ids(lines)
    pairs: dict[str, list[tuple[Mapping[str, Any], str | None]]] = {}
    for number, line in enumerate(lines, start=1):
        check_texts(line, number, ("category", "image", "question", "label"), "mmlm bench mme")
        if line["category"] not in CATEGORIES or line["label"] not in ("yes", "no"):
            raise InputError(
                f"Line {number}: category {line['category']!r} with label {line['label']!r}.",
                advice=f"Categories are {', '.join(CATEGORIES)}; labels are yes and no.",
            )
        key = f"{line['category']}\0{line['image']}"
        pairs.setdefault(key, []).append((line, answer_text(line, number)))
    _check_pairs(pairs)
    whole = {key: pair for key, pair in pairs.items() if None not in (pair[0][1], pair[1][1])}
    if not whole:
        raise InputError(
            f"None of {len(pairs)} pictures has two answers.", advice="Repeat the run."
        )
    table = CountTable.build(
        [pair[0][0]["image"] for pair in whole.values()],
        [_row([(line, str(text)) for line, text in pair]) for pair in whole.values()],
        _RATIOS,
    )
    return Scores(
        name="mme/hallucination",
        table=table,
        directions={name: _direction(name) for name in table.ratios},
        good=("correct",),
        samples=[_sample(line) for line in lines if not line.get("error")],
        official=_official(table),
        statuses={
            "neither yes nor no": int(table.sums()["neither"]),
            "failed": sum(bool(line.get("error")) for line in lines),
            "pictures left out": len(pairs) - len(whole),
        },
    )


def _direction(metric: str) -> Direction:
    return "none" if metric == "yes_ratio" else "higher"


def _check_pairs(pairs: Mapping[str, Sequence[Any]]) -> None:
    odd = [key for key, pair in pairs.items() if len(pair) != 2]
    if odd:
        name = odd[0].replace("\0", ": ")
        raise InputError(
            f"{len(odd)} pictures do not have two questions, e.g. {name} has {len(pairs[odd[0]])}.",
            advice="Score a finished run; accuracy+ needs both questions of every picture.",
        )


def _ratios() -> dict[str, Ratio | tuple[Ratio, ...]]:
    """All metrics; points are means of the two accuracies, so that a total has an interval."""

    def points(names: Sequence[str], most: float) -> tuple[Ratio, ...]:
        return tuple(
            Ratio((f"{name}.{part}",), (f"{name}.{of}",), most)
            for name in names
            for part, of in (("correct", "questions"), ("both", "pictures"))
        )

    return {
        "total_points": points(CATEGORIES, 800),
        **{f"{name}_points": points((name,), 200) for name in CATEGORIES},
        "accuracy": Ratio(("correct",), ("questions",)),
        "accuracy_plus": Ratio(("both",), ("pictures",)),
        "yes_ratio": Ratio(("said_yes",), ("questions",)),
    }


_RATIOS = _ratios()


def _row(pair: Sequence[tuple[Mapping[str, Any], str]]) -> dict[str, int]:
    """The counts of one picture; those of the other categories are 0."""
    said = [read_yes_no(text) for _, text in pair]
    right = sum(word == line["label"] for word, (line, _) in zip(said, pair, strict=True))
    counts = {"questions": 2, "correct": right, "pictures": 1, "both": int(right == 2)}
    row = {f"{name}.{count}": 0 for name in CATEGORIES for count in counts}
    row |= {f"{pair[0][0]['category']}.{count}": value for count, value in counts.items()}
    return row | counts | {"said_yes": said.count("yes"), "neither": said.count(None)}


def _official(table: CountTable) -> dict[str, str | None]:
    """Points with two decimals; None for a category that is not in the file."""
    values = {name: table.measure(f"{name}_points").value for name in (*CATEGORIES, "total")}
    return {name: None if value is None else f"{value:.2f}" for name, value in values.items()}


def _sample(line: Mapping[str, Any]) -> Sample:
    said = read_yes_no(line["text"])
    return Sample(
        id=line["id"],
        image=line["image"],
        question=line["question"],
        answer=line["text"],
        correct=said == line["label"],
        note=f"{line['category']}: expected {line['label']}, read as {said or 'neither'}",
    )
