"""HallusionBench: pictures and their manipulated twins, asked the same questions.

Paper: Guan et al., "HallusionBench: An Advanced Diagnostic Suite for Entangled Language
Hallucination and Visual Illusion in Large Vision-Language Models", arXiv 2310.14566 (CVPR 2024).
1,129 questions: VD (visual dependent) cannot be answered without the picture, VS (visual
supplement) can be answered from world knowledge, is asked without a picture too, and then with
pictures that contradict it.

Two ways of telling right from wrong, which give different numbers and are part of the name:

* ``hallusionbench/judge:<name>``: a language model compares the answer with the reference. The
  authors use GPT-4 at its default temperature, so their numbers vary from run to run.
* ``hallusionbench/yesno``: "yes" or "no" is looked for among the words of the answer, as
  VLMEvalKit does, and compared with the label. An answer with neither or both is unclear.

In both, being unclear counts as right where no picture is shown, as the authors have it. The
headline numbers are aAcc (questions), fAcc (figures with all questions right) and qAcc (one
question about all figures of a set). Yes to everything scores about 43 % in aAcc.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.base import Sample, Scores
from benchmarks.hallusionbench.counts import RATIOS, Outcome, count_sets, official
from benchmarks.hallusionbench.files import read_answers, write_official
from benchmarks.hallusionbench.questions import Entry, entries_of, find_figures, read_entries, task
from benchmarks.hallusionbench.verdicts import (
    JUDGE_PARTS,
    JUDGE_TEMPLATE,
    SAME_PARTS,
    SAME_TEMPLATE,
    judge_answers,
    judge_outcomes,
    read_templates,
    read_verdict,
    yesno_outcomes,
)
from benchmarks.judges import judged
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.base import Direction

    Line = Mapping[str, Any]

__all__ = [
    "JUDGE_PARTS",
    "JUDGE_TEMPLATE",
    "SAME_PARTS",
    "SAME_TEMPLATE",
    "VARIANTS",
    "Entry",
    "find_figures",
    "judge_answers",
    "read_answers",
    "read_entries",
    "read_templates",
    "read_verdict",
    "score_stored",
    "task",
    "write_official",
]

VARIANTS = ("yesno", "judge")


def score_stored(lines: Sequence[Line], variant: str = "yesno") -> Scores:
    """Scores the lines that `mmlm bench hallusionbench` stores, judged or not.

    Answers with an error, or without a verdict because the judge failed, are left out together
    with the figures and question pairs they belong to; they are counted, and the official numbers
    are withheld, because they would be about another set of questions.

    Raises:
        ValueError: If the variant is unknown.
        InputError: If a line lacks a field, an id occurs twice, no answer has a verdict, or the
            judge variant is asked for and no judge was.
    """
    if variant not in VARIANTS:
        raise ValueError(f"Unknown variant {variant!r}; there are: {', '.join(VARIANTS)}.")
    entries = entries_of(lines)
    if variant == "yesno":
        name, outcomes = "hallusionbench/yesno", yesno_outcomes(lines, entries)
    else:
        judge = judged.judge_of(lines)
        if judge is None:
            raise InputError(
                "The answers have not been judged.",
                advice="Run `mmlm score hallusionbench FILE --judge openai --judge.model gpt-4`, "
                "or take --variant yesno, which needs no judge.",
            )
        name, outcomes = f"hallusionbench/judge:{judge}", judge_outcomes(lines, entries)
    missing = sum(outcome.verdict is None for outcome in outcomes)
    if missing == len(outcomes):
        raise InputError(
            f"None of {len(outcomes)} answers has a verdict.",
            advice="Repeat the run, or ask the judge again.",
        )
    table = count_sets(outcomes)
    sums = table.sums()
    failed = sum(bool(line.get("error")) for line in lines)
    return Scores(
        name=name,
        table=table,
        directions={metric: _direction(metric) for metric in RATIOS},
        good=("correct",),
        samples=[_sample(line, o) for line, o in zip(lines, outcomes, strict=True)],
        official={} if missing else official(table, outcomes),
        statuses={
            "unparsed" if variant == "yesno" else "unclear": int(sums["unclear"]),
            "failed": failed,
            "not judged": missing - failed,
            "absent": _absent(entries),
            "reason of the error untold": int(sums["untold"]),
            "figures left out": int(sums["incomplete_figures"]),
            "question pairs left out": int(sums["incomplete_pairs"]),
        },
    )


def _direction(metric: str) -> Direction:
    if metric.endswith("Acc"):
        return "higher"
    return "lower" if metric in ("fig_wrong", "fig_inconsistent") else "none"


def _absent(entries: Mapping[str, Entry]) -> int:
    """How many published questions are missing; 0 if these are other questions."""
    published = {entry.id for entry in read_entries()}
    return len(published - entries.keys()) if entries.keys() <= published else 0


def _sample(line: Line, outcome: Outcome) -> Sample:
    verdict = outcome.verdict or "no verdict"
    return Sample(
        id=line["id"],
        image=line["image"],
        question=line["question"],
        answer=line.get("text") or "",
        correct=None if outcome.verdict is None else outcome.correct,
        note=f"{verdict}; reference: {line['reference']}",
        unit=outcome.entry.set,
    )
