"""MMIR: which elements of a page contradict the rest of it.

Paper: Yan et al., "Multimodal Inconsistency Reasoning (MMIR): A New Benchmark for Multimodal
Reasoning Models", arXiv 2502.16033 (ACL 2025). 534 web pages, office documents and posters, each
with one inconsistency put in. The model names the one or two elements that conflict: as ids from
the list of all (``mcq``), or in words (``open``), which a judge turns into ids.

It tests reasoning over a layout, not the invention of objects; small models sit near the floor, so
look at ``chance``, the expected score of naming two elements at random.

* ``mmir/official/mcq`` and ``mmir/official/open/<judge>``: the authors' rules.
* ``mmir/open-match``: ids by shared words, without a model. Never compare it with the others.

`score_mmir` is the authors' arithmetic on their own files; their overall number is divided by 534
even where answers are missing. Answers that are missing or have no ``<ans>`` are worth 0, and are
counted.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from benchmarks.base import CountTable, Ratio, Sample, Scores
from benchmarks.judges import judged
from benchmarks.mmir.files import SETTINGS, Question, elements_of, find_pictures, read_questions
from benchmarks.mmir.rules import (
    COUNT,
    MOST_IDS,
    SOURCES,
    answer_of,
    chance,
    extract,
    named_ids,
    points,
    score_mmir,
    source_of,
)
from benchmarks.mmir.verdicts import (
    JUDGE_PARTS,
    JUDGE_TEMPLATE,
    MATCH,
    judge_answers,
    match_answers,
    matched_id,
)
from benchmarks.run import Item, Task
from benchmarks.stored import answer_text, check_ids, check_texts
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

    Line = Mapping[str, Any]

__all__ = [
    "COUNT",
    "JUDGE_PARTS",
    "JUDGE_TEMPLATE",
    "MATCH",
    "SETTINGS",
    "Question",
    "elements_of",
    "extract",
    "find_pictures",
    "judge_answers",
    "match_answers",
    "matched_id",
    "named_ids",
    "points",
    "read_questions",
    "score_mmir",
    "score_stored",
    "task",
]


def task(questions: Sequence[Question], pictures: Mapping[str, Path], setting: str) -> Task:
    """The requests: the questions in the words of the file.

    Raises:
        InputError: If there are none.
    """
    if not questions:
        raise InputError("There are no questions to ask.", advice="Check the data set.")
    items = [
        Item(
            Request(str(question.index), (pictures[question.image],), question.text),
            {
                "benchmark": "mmir",
                "setting": setting,
                "source": question.source,
                "truth": list(question.truth),
                "elements": {str(name): text for name, text in question.elements.items()},
                "category": question.category,
                "image": question.image,
                "question": question.text,
            },
        )
        for question in questions
    ]
    return Task(f"mmir/{setting}", tuple(items))


def score_stored(lines: Sequence[Line]) -> Scores:
    """Scores the lines that `mmlm bench mmir` stores; answers in words must have been judged.

    Raises:
        InputError: If a line is damaged or of another benchmark, settings are mixed, or open
            answers have not been judged.
    """
    setting = _check(lines)
    judge = judged.judge_of(lines) if setting == "open" else None
    if setting == "open" and judge is None:
        raise InputError(
            "The answers are in words and have not been judged.",
            advice="Score them with --judge openai --judge.model o1-mini, or with --judge match, "
            "which needs no model.",
        )
    outcomes = [_outcome(line, number, setting) for number, line in enumerate(lines, start=1)]
    table = _table(lines, outcomes)
    return Scores(
        name=_name(setting, judge),
        table=table,
        directions={
            name: "none" if name in ("chance", "unparsed", "too_many_ids") else "higher"
            for name in table.ratios
        },
        good=("points",),
        samples=[_sample(*pair) for pair in zip(lines, outcomes, strict=True)],
        official=_official(lines, outcomes),
        statuses={name: n for name, n in _statuses(lines, outcomes).items() if n},
    )


def _name(setting: str, judge: str | None) -> str:
    if judge is None:
        return "mmir/official/mcq"
    return "mmir/open-match" if judge == MATCH else f"mmir/official/open/{judge}"


def _check(lines: Sequence[Line]) -> str:
    check_ids(lines)
    settings = set()
    for number, line in enumerate(lines, start=1):
        check_texts(line, number, ("setting", "source", "image"), "mmlm bench mmir")
        truth, elements = line.get("truth"), line.get("elements")
        if not isinstance(truth, list) or not isinstance(elements, dict) or not truth:
            raise InputError(
                f"Line {number} ({line['id']!r}) lacks 'truth' or 'elements'.",
                advice="Score files of `mmlm bench mmir`.",
            )
        settings.add(line["setting"])
    if len(settings) != 1 or not settings <= set(SETTINGS):
        raise InputError(
            f"The lines are of the settings {', '.join(sorted(map(str, settings)))}.",
            advice=f"Score one run at a time: {' or '.join(SETTINGS)}.",
        )
    return str(settings.pop())


def _outcome(line: Line, number: int, setting: str) -> dict[str, Any]:
    """What an answer names, and what that is worth."""
    text = answer_text(line, number)
    answer = "" if text is None else answer_of(text)
    ids_text, judged_it = answer, True
    if setting == "open":
        reply = judged.reply(line, "ids")
        judged_it = reply is not None or not answer
        ids_text = extract(reply or "", "id").strip()
    ids = named_ids(ids_text)
    foreign = {str(name) for name in ids} - set(line["elements"]) if line["elements"] else set()
    return {
        "points": points(ids_text, line["truth"]),
        "ids": sorted(ids),
        "failed": text is None,
        "unparsed": text is not None and not answer,
        "not judged": not judged_it,
        "too many": len(ids) > MOST_IDS,
        "foreign": bool(foreign),
    }


def _table(lines: Sequence[Line], outcomes: Sequence[Mapping[str, Any]]) -> CountTable:
    categories = sorted({line.get("category") or "" for line in lines} - {""})
    truths = (("one_element", 1), ("two_elements", 2))
    rows = []
    for line, outcome in zip(lines, outcomes, strict=True):
        worth = outcome["points"]
        row = {
            "questions": 1,
            "points": worth,
            "chance": chance(len(line["elements"]), len(line["truth"])),
            "listed": int(bool(line["elements"])),
            "unparsed": int(outcome["unparsed"]),
            "too_many_ids": int(outcome["too many"]),
        }
        groups = [(s, source_of(line["source"]) == s) for s in SOURCES]
        groups += [(name, len(line["truth"]) == count) for name, count in truths]
        groups += [(name, line.get("category") == name) for name in categories]
        for name, own in groups:
            row |= {f"{name}.questions": int(own), f"{name}.points": worth if own else 0}
        rows.append(row)
    ratios = {
        "overall": Ratio(("points",), ("questions",)),
        "chance": Ratio(("chance",), ("listed",)),
        "unparsed": Ratio(("unparsed",), ("questions",)),
        "too_many_ids": Ratio(("too_many_ids",), ("questions",)),
    }
    for name in (*SOURCES, *(name for name, _ in truths), *categories):
        ratios[name] = Ratio(("points",), ("questions",)).prefixed(name)
    return CountTable.build([line["image"] for line in lines], rows, ratios)


def _official(lines: Sequence[Line], outcomes: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """What the authors' script prints, in percent: overall is divided by 534."""
    counts = Counter(source_of(line["source"]) for line in lines)
    sums: Counter[str] = Counter()
    for line, outcome in zip(lines, outcomes, strict=True):
        sums[source_of(line["source"])] += outcome["points"]
    scores = {source: 100 * sums[source] / counts[source] for source in SOURCES if counts[source]}
    return scores | {"overall": 100 * sum(sums.values()) / COUNT}


def _statuses(lines: Sequence[Line], outcomes: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    names = ("failed", "not judged", "unparsed", "too many", "foreign")
    counts = {name: sum(bool(outcome[name]) for outcome in outcomes) for name in names}
    counts["more than two ids"] = counts.pop("too many")
    counts["id that is no element"] = counts.pop("foreign")
    return counts | {"absent": max(0, COUNT - len(lines))}


def _sample(line: Line, outcome: Mapping[str, Any]) -> Sample:
    named = ", ".join(str(name) for name in outcome["ids"]) or "none"
    return Sample(
        id=line["id"],
        image=line["image"],
        question=line.get("question") or "",
        answer=line.get("text") or "",
        correct=None if outcome["failed"] else outcome["points"] == 1,
        note=f"named {named}; true {', '.join(str(name) for name in line['truth'])}",
    )
