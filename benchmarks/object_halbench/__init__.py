"""Object HalBench: invented objects in detailed descriptions of 300 COCO pictures.

Papers: Rohrbach et al., arXiv 1809.02156 (the metric); Yu et al., "RLHF-V", arXiv 2312.00849 (the
benchmark as it is used). A judge lists the objects of an answer; what COCO does not know is
dropped; the rest is compared with the truth. "Resp." in papers is `response_rate`: invented
objects in how many of the answers *that name any COCO object*; "Ment." is `mention_rate`.

Judge, prompt and phrase reader change the numbers by more than methods do (a user got 9.6 / 5.0
for a checkpoint published with 8.5 / 4.3), so all of them are part of the name, as is a truth
other than the official one. Without a judge the answer's own words are read:
``object-halbench/words``.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from benchmarks.base import CountTable, Mark, Ratio, Sample, Scores
from benchmarks.coco import read_references, truth_from_coco, truth_of_val2014
from benchmarks.judges import judged
from benchmarks.object_halbench.judging import (
    ATTEMPTS,
    OBJECTS,
    PROMPT,
    SHORTEST,
    ask,
    stored_answer,
    stored_question,
)
from benchmarks.object_halbench.objects import Named, RulePhrases, named_by, named_in, parse_reply
from benchmarks.stored import check_ids
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence
    from pathlib import Path

    from benchmarks.base import Direction
    from benchmarks.object_halbench.objects import Phrases

__all__ = ["ATTEMPTS", "METRICS", "PROMPT", "Truth", "ask", "read_truth", "score_stored"]

METRICS: dict[str, Ratio] = {
    "response_rate": Ratio(("hallucinated_answers",), ("answers_with_objects",)),
    "mention_rate": Ratio(("hallucinated_mentions",), ("mentions",)),
    "recall": Ratio(("found_objects",), ("true_objects",)),
    "chair_s": Ratio(("hallucinated_answers",), ("answers",)),
    "mean_length": Ratio(("words",), ("answers",)),
}


DIRECTIONS: dict[str, Direction] = {
    "response_rate": "lower",
    "mention_rate": "lower",
    "recall": "higher",
    "chair_s": "lower",
    "mean_length": "none",
}


@dataclass(frozen=True)
class Truth:
    """What is in the pictures.

    Attributes:
        objects: COCO objects by image id.
        name: Part of the result's name if it is not the official truth, else "".
    """

    objects: Mapping[int, Collection[str]] = field(repr=False)
    name: str = ""


def read_truth(
    annotations: Sequence[str | Path] = (), references: Sequence[str | Path] = ()
) -> Truth:
    """Objects of the pictures: instances, and what reference captions name, read as nouns only.

    Args:
        annotations: COCO's instances*.json; officially those of train2014 and val2014. Without
            any, the table of val2014 that ships with mmlm: the same annotations, but with CHAIR's
            word rules for the captions.
        references: COCO's captions*.json for the same pictures.

    Raises:
        InputError: If a file cannot be read or is not in COCO format, or references are given
            without annotations.
    """
    if not annotations:
        if references:
            raise InputError(
                "There are reference captions but no annotations.",
                advice="Give the instances*.json of the same pictures as well.",
            )
        return Truth(truth_of_val2014(), "val2014-table")
    objects = truth_from_coco(annotations)
    for path in references:
        for image, caption in read_references(path):
            objects.setdefault(image, set()).update(named.node for named in named_in(caption))
    return Truth(objects, "" if references else "instances-only")


def score_stored(
    lines: Sequence[Mapping[str, Any]],
    *,
    truth: Truth | None = None,
    phrases: Phrases | None = None,
    extraction: Literal["auto", "words"] = "auto",
) -> Scores:
    """Scores stored answers: with the judge's replies in them, or by their own words.

    An answer for which the judge gave no readable list is left out and counted as a status (the
    official script stops there). Unit of the bootstrap: the picture.

    Args:
        lines: What `mmlm bench object-halbench` stores: id, image_id, question, text.
        truth: What is in the pictures; by default the shipped table of val2014.
        phrases: Reads the judge's phrases; by default `RulePhrases`.
        extraction: "auto": the judge's lists if the lines have them; "words": never.

    Raises:
        InputError: If a line lacks a field, ids are missing or double, a picture is not in the
            truth, lines were judged by different judges, or no answer is left.
    """
    check_ids(lines)
    truth = truth or read_truth()
    reader = phrases or RulePhrases()
    judge = judged.judge_of(lines) if extraction == "auto" else None
    statuses: Counter[str] = Counter()
    rows, images, samples = [], [], []
    for number, line in enumerate(lines, start=1):
        text, image = stored_answer(line, number), _image(line, number, truth)
        if text is None:
            statuses["no answer"] += 1
            continue
        if judge is None:
            named: list[Named] | None = named_in(text)
        else:
            named = _listed(line, text, reader, statuses)
        if named is not None:
            present = frozenset(truth.objects[image])
            rows.append(_row(text, named, present))
            images.append(image)
            samples.append(_sample(line, stored_question(line, number), text, named, present))
    if not rows:
        raise InputError(
            f"None of the {len(lines)} answers can be scored: {dict(statuses)}.",
            advice="Repeat the run, or ask the judge again.",
        )
    parts = ("words",) if judge is None else (judge, reader.name)
    name = "/".join(part for part in ("object-halbench", *parts, truth.name) if part)
    table = CountTable.build(images, rows, METRICS)
    return Scores(
        name=name,
        table=table,
        directions=DIRECTIONS,
        good=("found_objects",),
        bad=("hallucinated_mentions",),
        samples=samples,
        official=_official(table),
        statuses=dict(statuses),
    )


def _listed(
    line: Mapping[str, Any], text: str, reader: Phrases, statuses: Counter[str]
) -> list[Named] | None:
    """The objects in the judge's list; None, and a status, if there is no list."""
    if len(text.split()) < SHORTEST:
        statuses["short: the judge was not asked"] += 1
        return []
    reply = judged.reply(line, OBJECTS)
    if reply is None:
        reason = line["judged"].get(OBJECTS, {}).get("reason", "not asked")
        statuses[f"not judged: {reason}"] += 1
        return None
    listed = parse_reply(reply)
    if listed is None:
        statuses["not judged: no JSON list in the reply"] += 1
        return None
    return named_by(listed, reader, text)


def _row(text: str, named: Sequence[Named], present: Collection[str]) -> dict[str, int]:
    wrong = sum(item.node not in present for item in named)
    return {
        "answers": 1,
        "answers_with_objects": int(bool(named)),
        "hallucinated_answers": int(wrong > 0),
        "mentions": len(named),
        "hallucinated_mentions": wrong,
        "found_objects": len({item.node for item in named} & set(present)),
        "true_objects": len(present),
        "words": len(text.split(" ")),  # officially at single blanks: "" is one word
    }


def _sample(
    line: Mapping[str, Any],
    question: str,
    text: str,
    named: Sequence[Named],
    present: Collection[str],
) -> Sample:
    invented = [item for item in named if item.node not in present]
    marks = [
        Mark(item.start, item.end, "good" if item.node in present else "bad", item.node)
        for item in sorted(named, key=lambda item: (item.start, item.end))
        if item.end > item.start
    ]
    return Sample(
        id=line["id"],
        image=str(line.get("image") or line["image_id"]),
        question=question,
        answer=text,
        correct=not invented if named else None,
        note=f"{len(invented)} of {len(named)} objects invented",
        marks=tuple(_apart(marks)),
        unit=str(line["image_id"]),
    )


def _apart(marks: Sequence[Mark]) -> list[Mark]:
    """Marks that do not overlap: two words of one phrase have the place of the phrase."""
    kept: list[Mark] = []
    for mark in marks:
        if not kept or mark.start >= kept[-1].end:
            kept.append(mark)
    return kept


def _official(table: CountTable) -> dict[str, Any]:
    """What the authors' summary prints. Its "COCO Word Number" counts distinct correct objects."""
    sums = table.sums()

    def percent(name: str, *, rest: bool = False) -> str | None:
        value = table.measure(name).value
        return None if value is None else f"{100 * (1 - value if rest else value):.2f}"

    return {
        "Response Hall": percent("response_rate"),
        "Object Hall": percent("mention_rate"),
        "Response Correct": percent("response_rate", rest=True),
        "Object Correct": percent("mention_rate", rest=True),
        "Object Recall": percent("recall"),
        "Average Length": f"{table.measure('mean_length').value:.2f}",
        "COCO Sent Number": sums["answers_with_objects"],
        "COCO Word Number": sums["found_objects"],
        "GT Word Number": sums["true_objects"],
    }


def _image(line: Mapping[str, Any], number: int, truth: Truth) -> int:
    image = line.get("image_id")
    if isinstance(image, str) and re.fullmatch(r"\d+", image):
        image = int(image)
    if not isinstance(image, int) or isinstance(image, bool):
        raise InputError(
            f"Line {number} ({line.get('id')!r}): image_id must be a number, found {image!r}.",
            advice="Score files of `mmlm bench object-halbench`, or add --official.",
        )
    if image not in truth.objects:
        raise InputError(
            f"Line {number} ({line.get('id')!r}): picture {image} is not in the annotations.",
            advice="Give the --annotations (and --references) of the pictures that were asked.",
        )
    return image
