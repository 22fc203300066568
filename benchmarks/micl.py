"""Answers to the procedural tasks of `mmlm data micl`: ``micl/exact``.

Answers are read as VL-ICL Bench reads them: without blanks around, up to the first line end or
else the first full stop; of numeric tasks the first number (with its sign, unlike there, where a
minus is lost); compared in lower case. Tasks whose rule never changes can be solved without the
demonstrations and say little about learning from pictures: the mean is given with and without
them. Unit of the bootstrap is the episode.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.base import CountTable, Direction, Ratio, Sample, Scores
from mmlm.errors import InputError

__all__ = ["normalised", "right", "score_stored"]

_NUMBER = re.compile(r"-?\d+")


def normalised(text: str, compare: str, parts: int = 1) -> str:
    """What of an answer is compared.

    Args:
        text: The model's answer.
        compare: "number" or "word".
        parts: How many numbers the right answer has.
    """
    text = text.strip()
    text = (text.split("\n")[0] if "\n" in text else text.split(".")[0]).strip().lower()
    if compare == "number":
        return " ".join(str(int(number)) for number in _NUMBER.findall(text)[:parts])
    return text.strip(" .,!?\"'")


def right(text: str, answer: str, compare: str) -> bool:
    """Whether an answer is the right one.

    Args:
        text: The model's answer.
        answer: The right one.
        compare: "number" or "word".
    """
    parts = len(_NUMBER.findall(answer)) if compare == "number" else 1
    return normalised(text, compare, parts) == normalised(answer, compare, parts)


def score_stored(lines: Sequence[Mapping[str, Any]]) -> Scores:
    """Scores stored answers.

    Args:
        lines: Lines of ``mmlm generate`` on the episodes of ``mmlm data micl``; those with an
            ``error`` are left out and counted.

    Returns:
        Accuracy of every task, and its mean over tasks with and without those of a single rule.

    Raises:
        InputError: If a line is no answer to an episode, or there is none.
    """
    answered = [line for line in lines if not line.get("error")]
    if not answered:
        raise InputError(
            "There is no answer to score.", advice="Answer the episodes with `mmlm generate` first."
        )
    tasks = list(dict.fromkeys(_checked(line)["task"] for line in answered))
    latent = [t for t in tasks if any(x["has_latent"] for x in answered if x["task"] == t)]
    ratios: dict[str, Ratio | tuple[Ratio, ...]] = {}
    if latent:
        ratios["with_latent"] = tuple(_accuracy(task) for task in latent)
    ratios["all_tasks"] = tuple(_accuracy(task) for task in tasks)
    ratios |= {task: _accuracy(task) for task in tasks}
    rows, samples = [], []
    for line in answered:
        good = right(line["text"], line["answer"], line["compare"])
        row = {f"{task}.{name}": 0 for task in tasks for name in ("right", "asked")}
        row[f"{line['task']}.asked"] = 1
        row[f"{line['task']}.right"] = int(good)
        rows.append(row | {"right": int(good), "wrong": int(not good)})
        samples.append(_sample(line, good))
    directions: dict[str, Direction] = dict.fromkeys(ratios, "higher")
    table = CountTable.build([line["id"] for line in answered], rows, ratios)
    failed = len(lines) - len(answered)
    return Scores(
        name="micl/exact",
        table=table,
        directions=directions,
        good=("right",),
        bad=("wrong",),
        samples=samples,
        statuses={"failed": failed} if failed else {},
        details={"condition": sorted({str(line.get("condition", "full")) for line in answered})},
    )


def _accuracy(task: str) -> Ratio:
    return Ratio((f"{task}.right",), (f"{task}.asked",))


def _checked(line: Mapping[str, Any]) -> Mapping[str, Any]:
    texts = ("id", "task", "compare", "answer", "text")
    for name, kind in {"has_latent": bool, **dict.fromkeys(texts, str)}.items():
        if not isinstance(line.get(name), kind):
            raise InputError(
                f"The line {line.get('id')!r} is no answer to an episode: {name!r} is "
                f"{line.get(name)!r}.",
                advice="Score the output of `mmlm generate --input DIR/episodes.jsonl`.",
            )
    if line["compare"] not in ("number", "word"):
        raise InputError(
            f"The line {line['id']!r} says compare = {line['compare']!r}, not number or word.",
            advice="Make the episodes again with `mmlm data micl`.",
        )
    return line


def _sample(line: Mapping[str, Any], good: bool) -> Sample:
    others = ", ".join(line.get("other_answers", ()))
    return Sample(
        id=str(line["id"]),
        image=(line.get("images") or [""])[-1],
        question=f"{line['task']} ({line.get('latent', '')})",
        answer=line["text"],
        correct=good,
        note=f"expected {line['answer']}" + (f"; under other rules {others}" if others else ""),
        unit=str(line["id"]),
    )
