"""SwapMix: does the answer move when something is exchanged that the question is not about?

Paper: Gupta et al., "SwapMix: Diagnosing and Regularizing the Over-Reliance on Visual Context in
Visual Question Answering", arXiv 2204.02285 (CVPR 2022). Objects that a question does not need are
replaced one at a time. The right answer stays; a model whose answer moves has leaned on context.
It is the counterpart of CHAIR's cause "scene prior": who says "fork" because there is a plate loses
the fork together with the plate.

Two levels, which are part of the name because they measure different things:

* ``swapmix/world``: the picture itself is painted again with another object in it. Only the
  embedded world can do that.
* ``swapmix/features``: the features of the object's patches are replaced where they enter the
  decoder; any picture with boxes will do. It measures less: attention inside the vision tower has
  spread every object over all patches before.

``score_swapmix`` is the authors' arithmetic. Beside their numbers stand rates that do not grow with
the number of swaps, and what noise alone does. "Any of m swaps" grows with m: never compare context
reliances with another ``swaps_per_question``.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.base import CountTable, Ratio, Sample, Scores
from benchmarks.swapmix import captions
from benchmarks.swapmix.answers import OTHER, READERS, read_answer
from benchmarks.swapmix.counts import DIRECTIONS, NEEDS, RATIOS, SWAPS, row_of, score_swapmix
from benchmarks.swapmix.questions import CAPTION, ORIGINAL, Asked, Group, Variant, grouped, task
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from benchmarks.base import Direction

    Line = Mapping[str, Any]

__all__ = [
    "CAPTION",
    "OTHER",
    "READERS",
    "SWAPS",
    "Asked",
    "Variant",
    "read_answer",
    "records",
    "score_stored",
    "score_swapmix",
    "task",
]

_BY_TYPE = (
    "context_reliance",
    "accuracy",
    "effective_accuracy",
    "excess",
    "flip_rate",
    "noise_flip_rate",
    "swaps_per_question",
)


def score_stored(lines: Sequence[Line]) -> Scores:
    """Scores the lines that `mmlm bench swapmix` stores.

    A question of which one answer failed is left out and counted. The headline numbers are those
    of the questions; words of captions are a type of their own and not among them.

    Raises:
        InputError: If a line is damaged or of another benchmark, levels are mixed, or no question
            has all its answers.
    """
    groups = grouped(lines)
    levels = sorted({str(group.original["level"]) for group in groups})
    if len(levels) > 1:
        raise InputError(
            f"The lines are of several levels: {', '.join(levels)}.",
            advice="Score each run by itself.",
        )
    whole = [group for group in groups if not group.failed]
    if not whole:
        raise InputError("No question has all its answers.", advice="Repeat the run.")
    table = _table(whole)
    failed = sum(bool(line.get("error")) for line in lines)
    statuses = {
        "failed": failed,
        "questions left out": len(groups) - len(whole),
        "swaps skipped": sum(int(group.original.get("skipped", 0)) for group in groups),
    }
    return Scores(
        name=f"swapmix/{levels[0]}",
        table=table,
        directions={name: _direction(name) for name in table.ratios},
        good=("firm",),
        bad=("changed",),
        samples=[sample for group in whole for sample in _samples(group)],
        statuses={name: count for name, count in statuses.items() if count},
        details={"right answers": int(table.sums()["right"])},
    )


def records(group: Group) -> list[dict[str, Any]]:
    """The answers to a question as `score_swapmix` takes them; of a caption, one per object."""
    if group.kind == CAPTION:
        return captions.word_questions(group)
    kind = group.kind
    answers = {
        f"{swap}_swaps": [read_answer(kind, line["text"]) for line in group.of(swap)]
        for swap in SWAPS
    }
    return [
        {
            "answer": group.original["label"],
            "original": read_answer(kind, group.original["text"]),
            "near": [bool(line["near"]) for line in group.of("object")],
            **answers,
        }
    ]


def _table(groups: Sequence[Group]) -> CountTable:
    """Counts of every picture: of all questions, and of each type apart."""
    kinds = [kind for kind in (*READERS, CAPTION) if any(g.kind == kind for g in groups)]
    pictures: list[str] = []
    rows: list[dict[str, float]] = []
    for group in groups:
        for part, words in _rows(group):
            nothing = dict.fromkeys(part, 0.0)
            own = {kind: part if kind == group.kind else nothing for kind in kinds}
            scoped = {f"{kind}.{name}": n for kind in kinds for name, n in own[kind].items()}
            overall = nothing if group.kind == CAPTION else part
            pictures.append(str(group.original["picture"]))
            rows.append({**overall, **words, **scoped})
    return CountTable.build(pictures, rows, _ratios(groups, kinds))


def _ratios(groups: Sequence[Group], kinds: Sequence[str]) -> dict[str, Ratio]:
    """The rates of what was asked and changed; others would be undefined."""
    tried = {line["swap"] for group in groups for line in group.swaps}
    known = {name: ratio for name, ratio in RATIOS.items() if NEEDS.get(name, "") in {"", *tried}}
    ratios = dict(known) if set(kinds) - {CAPTION} else {}
    for kind in kinds:
        own = [name for name in _BY_TYPE if name in known]
        ratios |= {f"{kind}_{name}": known[name].prefixed(kind) for name in own}
    if CAPTION in kinds:
        words = captions.RATIOS.items()
        ratios |= {n: r for n, r in words if "noise" in tried or not n.startswith("noise")}
    return ratios


def _rows(group: Group) -> Iterator[tuple[dict[str, float], Mapping[str, float]]]:
    """Counts of a question; of a caption those of each object, then those of all its words."""
    none = dict.fromkeys(captions.WORD_COLUMNS, 0)
    for record in records(group):
        yield row_of(record, other=OTHER), none
    if group.kind == CAPTION:
        yield dict.fromkeys(row_of({"answer": 0, "original": 1}), 0.0), captions.word_counts(group)


def _direction(name: str) -> Direction:
    if name in captions.RATIOS:
        return "lower"
    for kind in (*READERS, CAPTION):
        name = name.removeprefix(f"{kind}_")
    return DIRECTIONS[name]


def _samples(group: Group) -> Iterator[Sample]:
    """The answer about the untouched picture; then after each change, right if it has not moved."""
    lines = (group.original, *group.swaps)
    if group.kind == CAPTION:
        yield from (_sample(line, None) for line in lines)
        return
    original = read_answer(group.kind, group.original["text"])
    right = original == group.original["label"]
    yield _sample(group.original, right)
    for line in group.swaps:  # of an answer that was wrong from the start nothing is expected
        moved = read_answer(group.kind, line["text"]) != original
        yield _sample(line, not moved if right else None)


def _sample(line: Line, correct: bool | None) -> Sample:
    original = line["swap"] == ORIGINAL
    note = f"truth: {line['label'] or '-'}" if original else f"{line['swap']}: {line['note']}"
    return Sample(
        id=line["id"],
        image=line["image"],
        question=line["question"],
        answer=line["text"],
        correct=correct,
        note=note,
        unit=str(line["picture"]),
    )
