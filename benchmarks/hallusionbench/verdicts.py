"""How HallusionBench's answers are found right or wrong: by a judge, or by their yes or no."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.hallusionbench.counts import Outcome, needs_same
from benchmarks.hallusionbench.questions import Entry, entries_of
from benchmarks.judges import JudgePrompt, judged
from benchmarks.judges.judged import Template
from benchmarks.pope import PARSERS
from benchmarks.stored import answer_text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

    from benchmarks.hallusionbench.counts import Verdict
    from benchmarks.judges import Judge

    Line = Mapping[str, Any]

__all__ = [
    "JUDGE_PARTS",
    "JUDGE_TEMPLATE",
    "SAME_PARTS",
    "SAME_TEMPLATE",
    "judge_answers",
    "judge_outcomes",
    "judge_verdicts",
    "read_same",
    "read_templates",
    "read_verdict",
    "yesno_outcomes",
]

JUDGE_PARTS = ("question", "reference answer", "answer")
SAME_PARTS = ("answer", "answer about the original figure")

JUDGE_TEMPLATE = Template(
    "You are checking one answer of a student. Read the question, the reference answer and the "
    "student's answer. Reply with a single word: correct, if the student's answer agrees with the "
    "reference answer; incorrect, if it contradicts the reference answer; unclear, if it does not "
    "commit itself.\n\n"
    "Question: {}\nReference answer: {}\nStudent's answer: {}\n\nVerdict:"
)
SAME_TEMPLATE = Template(
    "Below are two statements about two situations that you cannot see. Could both be true if "
    "they were about one and the same situation? Reply with a single word: same, if they do not "
    "contradict each other; different, if they do.\n\n"
    "First statement: {}\nSecond statement: {}\n\nVerdict:"
)


def read_templates(first: Path | None, second: Path | None) -> tuple[Template, Template]:
    """The two prompts of a judge, from files or our own.

    Raises:
        InputError: If a file cannot be read or has another number of places.
    """
    return (
        JUDGE_TEMPLATE if first is None else judged.read_template(first, JUDGE_PARTS),
        SAME_TEMPLATE if second is None else judged.read_template(second, SAME_PARTS),
    )


def read_verdict(reply: str) -> Verdict:
    """Reads a judge's reply by the authors' rule: "incorrect", else "correct", else unclear."""
    text = reply.lower()
    return "incorrect" if "incorrect" in text else "correct" if "correct" in text else "unclear"


def read_same(reply: str) -> bool:
    """Reads a judge's reply by the authors' rule: "not the same" is the same, too."""
    return "same" in reply.lower()


def judge_answers(
    lines: Sequence[Line],
    judge: Judge,
    template: Template = JUDGE_TEMPLATE,
    same_template: Template = SAME_TEMPLATE,
) -> list[dict[str, Any]]:
    """Asks a judge whether answers are right, and where it matters whether an answer changed.

    The authors ask for the second about every entry; here only where the reason of an error
    depends on it (`counts.needs_same`), which gives the same numbers for less money.

    Args:
        lines: Stored answers.
        judge: Who is asked.
        template: Prompt for the first question, with the places `JUDGE_PARTS`.
        same_template: Prompt for the second one, with the places `SAME_PARTS`.
    """
    entries = entries_of(lines)
    texts = {line["id"]: answer_text(line, i) for i, line in enumerate(lines, start=1)}
    wording = template.name
    if same_template.name != SAME_TEMPLATE.name:
        wording += f"+{same_template.name}"
    prompts = {
        name: JudgePrompt(name, template.fill(entry.question, entry.reference, str(texts[name])))
        for name, entry in entries.items()
        if texts[name] is not None
    }
    once = judged.add_verdicts(lines, judge, "correctness", prompts, template=wording)
    verdicts = judge_verdicts(once)
    originals = {entry.pair: name for name, entry in entries.items() if entry.is_original}
    again = {}
    for name, entry in entries.items():
        first = originals.get(entry.pair)
        if first and needs_same(entry, verdicts[name], verdicts[first]):
            text = same_template.fill(str(texts[name]), str(texts[first]))
            again[name] = JudgePrompt(f"{name}#same", text)
    return judged.add_verdicts(once, judge, "same", again, template=wording)


def yesno_outcomes(lines: Sequence[Line], entries: Mapping[str, Entry]) -> list[Outcome]:
    """What a look for the words yes and no makes of the answers."""
    read = PARSERS["vlmevalkit"].read
    said: dict[str, str | None] = {}
    for number, line in enumerate(lines, start=1):
        text = answer_text(line, number)
        if text is not None:
            said[line["id"]] = {True: "yes", False: "no", None: None}[read(text, line["label"])]
    first = {entry.pair: said.get(name) for name, entry in entries.items() if entry.is_original}
    outcomes = []
    for name, entry in entries.items():
        verdict: Verdict | None = None
        if name in said:
            word = said[name]
            verdict = "unclear" if word is None else _verdict(word == entry.label)
        outcomes.append(Outcome(entry, verdict, said.get(name) == first[entry.pair]))
    return outcomes


def _verdict(right: bool) -> Verdict:
    return "correct" if right else "incorrect"


def judge_verdicts(lines: Iterable[Line]) -> dict[str, Verdict | None]:
    """The judge's verdict on each answer, by id; None where there is none."""
    replies = {line["id"]: judged.reply(line, "correctness") for line in lines}
    return {name: None if said is None else read_verdict(said) for name, said in replies.items()}


def judge_outcomes(lines: Sequence[Line], entries: Mapping[str, Entry]) -> list[Outcome]:
    """What a judge made of the answers."""
    verdicts = judge_verdicts(lines)
    outcomes = []
    for line in lines:
        same = judged.reply(line, "same")
        flag = None if same is None else read_same(same)
        outcomes.append(Outcome(entries[line["id"]], verdicts[line["id"]], flag))
    return outcomes
