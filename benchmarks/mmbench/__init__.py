"""MMBench: single choice, asked once for every cyclic shift of the options.

Paper: Liu et al., "MMBench: Is Your Multi-modal Model an All-around Player?", arXiv 2307.06281.
Under CircularEval a question is right only if it is answered rightly with its options in every
cyclic order; the vanilla accuracy, from the first order alone, is several points higher. Version,
split, language and way of asking are part of the name: ``mmbench/v1.1-dev-en/circular``.

Prompt and reading follow lmms-eval 0.7.3: option letter, else option text. What neither finds may
be put to a judge, as the authors do; without one it is wrong and counted.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from typing import TYPE_CHECKING, Any

from benchmarks.base import CountTable, Ratio, Sample, Scores
from benchmarks.choices import sole_option
from benchmarks.judges import JudgePrompt
from benchmarks.mmbench.answers import read_official, write_official
from benchmarks.mmbench.files import Edition, Problem, Way, read_problems, recognise
from benchmarks.multi_image.scoring import answered_lines
from benchmarks.run import Item, Task
from mmlm.errors import InputError
from mmlm.runner import Request

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.judges import Judge

__all__ = [
    "Edition",
    "Problem",
    "Way",
    "judge_prompts",
    "read_official",
    "read_problems",
    "recognise",
    "score_stored",
    "task",
    "write_official",
]

SUFFIXES = {
    "en": "Answer with the option's letter from the given choices directly.",
    "cn": "请直接使用所提供的选项字母作为答案回答。",
}
# The matching prompt of MMBench's own evaluation (VLMEvalKit, Apache-2.0); other words would give
# other verdicts.
_JUDGE = (
    "You are an AI assistant who will help me to match an answer with several options of a "
    "single-choice question. You are provided with a question, several options, and an answer, "
    "and you need to find which option is most similar to the answer. If the meaning of all "
    "options are significantly different from the answer, output E. Your should output a single "
    "uppercase character in A, B, C, D (if they are valid options), and E. \n"
    "Example 1: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit "
    "C. cat D. dog\nAnswer: a cute teddy bear\nYour output: A\n"
    "Example 2: \nQuestion: What is the main object in image?\nOptions: A. teddy bear B. rabbit "
    "C. cat D. dog\nAnswer: Spider\nYour output: E\n"
    "Example 3: \nQuestion: {}?\nOptions: {}\nAnswer: {}\nYour output: "
)


def task(problems: Sequence[Problem], edition: Edition, way: Way = "circular") -> Task:
    """The requests: hint, question and options in lmms-eval's words.

    Raises:
        InputError: If there are none.
    """
    if not problems:
        raise InputError("There are no questions to ask.", advice="Check the table.")
    items = []
    for one in problems:
        options = "\n".join(f"{letter}. {text}" for letter, text in one.options.items())
        hint = f"{one.hint} " if one.hint else ""
        prompt = f"{hint}{one.question} There are several options:\n{options}\n\n"
        request = Request(str(one.index), (one.image,), prompt + SUFFIXES[edition.language])
        items.append(Item(request, _facts(one, edition, way)))
    return Task(f"mmbench/{edition}/{way}", tuple(items))


def _facts(one: Problem, edition: Edition, way: Way) -> dict[str, Any]:
    return {
        "benchmark": "mmbench",
        "edition": str(edition),
        "way": way,
        "problem": str(one.number),
        "shift": one.shift,
        "image": one.image.name,
        "question": one.question,
        "hint": one.hint,
        "options": dict(one.options),
        "label": one.answer,
        "category": one.category,
        "group": one.group,
    }


def score_stored(lines: Sequence[Mapping[str, Any]], judge: Judge | None = None) -> Scores:
    """Scores stored answers; the headline is the circular accuracy if all shifts were asked.

    A question of which one shift has no answer is left out and counted. The unit of the bootstrap
    is the picture.

    Args:
        lines: Lines of `mmlm bench mmbench`, or of `read_official`.
        judge: Asked about replies in which no option is found; its name becomes part of the
            result's. By default they are wrong.

    Raises:
        InputError: If a line is damaged, doubled, or of another benchmark or edition, or a
            question lacks a shift.
    """
    answered, failed = answered_lines("mmbench", lines, ("problem", "image", "edition", "way"))
    kinds = {(line["edition"], line["way"]) for line in lines}
    if len(kinds) > 1:
        named = ", ".join("/".join(kind) for kind in sorted(kinds))
        raise InputError(
            f"The lines are of several runs: {named}.",
            advice="Score each run by itself.",
        )
    edition, way = kinds.pop()
    problems = _whole_problems(lines, answered, way)
    letters, statuses = _letters(answered, judge)
    statuses["failed"] = failed
    left_out = len({line["problem"] for line in lines}) - len(problems)
    statuses["question with a failed shift"] = left_out
    statuses["label is secret"] = sum(line["label"] is None for line in answered)
    table = _table(problems, letters, way)
    named = f"/judge={judge.name}" if judge is not None else ""
    return Scores(
        name=f"mmbench/{edition}/{way}{named}",
        table=table,
        directions=dict.fromkeys(table.ratios, "higher"),
        good=("right",),
        bad=("wrong",),
        samples=[_sample(line, letters[line["id"]]) for line in answered],
        official=_official(problems, letters),
        statuses={name: count for name, count in statuses.items() if count},
    )


def _whole_problems(
    lines: Sequence[Mapping[str, Any]], answered: Sequence[Mapping[str, Any]], way: Way
) -> list[list[Mapping[str, Any]]]:
    """The lines of each question all of whose shifts have an answer."""
    asked: dict[str, set[int]] = defaultdict(set)
    for line in lines:
        asked[line["problem"]].add(line["shift"])
    groups: dict[str, list[Mapping[str, Any]]] = defaultdict(list)
    for line in answered:
        groups[line["problem"]].append(line)
    for name, group in groups.items():
        wanted = set(range(len(group[0]["options"]))) if way == "circular" else {0}
        if asked[name] != wanted:
            raise InputError(
                f"Question {name} was asked with the shifts {sorted(asked[name])}, not with "
                f"{sorted(wanted)}.",
                advice="Finish the run; a part of the shifts makes no circular score.",
            )
    return [group for name, group in groups.items() if len(group) == len(asked[name])]


def _letters(
    lines: Sequence[Mapping[str, Any]], judge: Judge | None
) -> tuple[dict[str, str], Counter[str]]:
    """The option that each reply names, and how many had none at first or at last."""
    letters = {line["id"]: sole_option(line["text"], line["options"]).letter for line in lines}
    open_ones = [line for line in lines if not letters[line["id"]]]
    if judge is None:
        return letters, Counter({"no option": len(open_ones)})
    statuses = Counter(judged=0)
    for line, verdict in zip(open_ones, judge.ask(judge_prompts(open_ones)), strict=True):
        reply = verdict.reply or ""
        letters[line["id"]] = sole_option(reply, line["options"]).letter
        statuses["judged" if letters[line["id"]] else "not judged"] += 1
    return letters, statuses


def judge_prompts(lines: Sequence[Mapping[str, Any]]) -> list[JudgePrompt]:
    """What a judge is asked about lines in which no option was found."""
    prompts = []
    for line in lines:
        options = "".join(f"{letter}. {text}\n" for letter, text in line["options"].items())
        listed = f"There are several options: \n{options}"
        text = _JUDGE.format(line["question"], listed, line["text"])
        prompts.append(JudgePrompt(line["id"], text))
    return prompts


def _is_right(group: Sequence[Mapping[str, Any]], letters: Mapping[str, str]) -> bool:
    return all(letters[line["id"]] == line["label"] for line in group)


def _table(
    problems: Sequence[Sequence[Mapping[str, Any]]], letters: Mapping[str, str], way: Way
) -> CountTable:
    groups = sorted({group[0]["group"] for group in problems} - {""})
    rows = []
    for lines in problems:
        known = int(lines[0]["label"] is not None)
        right = known * int(_is_right(lines, letters))
        first = [line for line in lines if line["shift"] == 0]
        row = {
            "problems": known,
            "right": right,
            "wrong": known - right,
            "first_right": known * int(_is_right(first, letters)),
            "shifts": known * len(lines),
            "shifts_right": sum(known * int(_is_right([line], letters)) for line in lines),
        }
        for name in groups:
            own = int(lines[0]["group"] == name)
            row |= {f"{name}.problems": own * known, f"{name}.right": own * right}
        rows.append(row)
    ratios = {"vanilla_accuracy": Ratio(("first_right",), ("problems",))}
    if way == "circular":
        circular = {"circular_accuracy": Ratio(("right",), ("problems",))}
        ratios = circular | ratios | {"shift_accuracy": Ratio(("shifts_right",), ("shifts",))}
    if len(groups) > 1:
        ratios |= {name: Ratio(("right",), ("problems",)).prefixed(name) for name in groups}
    units = [lines[0]["image"] or lines[0]["problem"] for lines in problems]
    if not problems:
        raise InputError(
            "No question has answers to all its shifts.", advice="Repeat the failed requests."
        )
    return CountTable.build(units, rows, ratios)


def _official(
    problems: Sequence[Sequence[Mapping[str, Any]]], letters: Mapping[str, str]
) -> dict[str, float]:
    """What the official evaluation prints: overall and by ability, in percent."""
    hits: dict[str, list[bool]] = defaultdict(list)
    for lines in problems:
        if lines[0]["label"] is None:
            continue
        right = _is_right(lines, letters)
        hits["Overall"].append(right)
        if lines[0]["category"]:
            hits[lines[0]["category"]].append(right)
    names = ["Overall", *sorted(hits.keys() - {"Overall"})]
    return {name: 100 * sum(hits[name]) / len(hits[name]) for name in names if hits[name]}


def _sample(line: Mapping[str, Any], letter: str) -> Sample:
    label = line["label"]
    note = f"shift {line['shift']}: expected {label}, read {letter or 'nothing'}"
    correct = None if label is None else letter == label
    return Sample(line["id"], line["image"], line["question"], line["text"], correct, note)
