"""How an answer in words becomes ids: by a judge, or by the words it shares with an element."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any

from benchmarks.judges import JudgePrompt, judged
from benchmarks.judges.judged import Template
from benchmarks.mmir.rules import answer_of
from benchmarks.stored import answer_text

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.judges import Judge

    Line = Mapping[str, Any]

__all__ = ["JUDGE_PARTS", "JUDGE_TEMPLATE", "MATCH", "judge_answers", "match_answers", "matched_id"]

MATCH = "match"
"""Name of the judge that needs no model. Its numbers are not those of the authors' judge."""
JUDGE_PARTS = ("elements", "answer")
JUDGE_TEMPLATE = Template(
    "A person was asked which one or two elements of a page contradict the rest of it. Below are "
    "the elements, each with its id, and the person's answer. Find the elements that the answer "
    "is about and write their ids, at most two, separated by commas, as <id>ids</id>. Write "
    "<id></id> if the answer is about none of them.\n\n"
    "Elements:\n{}\n\nAnswer: {}\n\nIds:"
)


def judge_answers(
    lines: Sequence[Line], judge: Judge, template: Template = JUDGE_TEMPLATE
) -> list[dict[str, Any]]:
    """Asks a judge which elements each answer is about; empty answers are not put to it.

    Args:
        lines: Stored answers to open questions.
        judge: Who is asked.
        template: Its prompt, with the places `JUDGE_PARTS`.
    """
    prompts = {}
    for number, line in enumerate(lines, start=1):
        text = answer_text(line, number)
        if text is not None and (answer := answer_of(text)):
            listed = "\n".join(f"[{name}] {words}" for name, words in line["elements"].items())
            prompts[line["id"]] = JudgePrompt(line["id"], template.fill(listed, answer))
    return judged.add_verdicts(lines, judge, "ids", prompts, template=template.name)


def match_answers(lines: Sequence[Line]) -> list[dict[str, Any]]:
    """Gives each answer the id of the element with which it shares most words (`matched_id`)."""
    found = []
    for number, line in enumerate(lines, start=1):
        text = answer_text(line, number)
        entries = {}
        if text is not None:
            best = matched_id(answer_of(text), line["elements"])
            entries = {"ids": {"reply": f"<id>{best}</id>"}}
        found.append({**line, "judge": MATCH, "judged": entries})
    return found


def matched_id(answer: str, elements: Mapping[str, str]) -> str:
    """The element whose description has the best token F1 with an answer; "" for none or a tie."""
    said = _tokens(answer)
    scores = {name: _f1(said, _tokens(text)) for name, text in elements.items()}
    best = max(scores.values(), default=0.0)
    winners = [name for name, score in scores.items() if score == best]
    return winners[0] if best > 0 and len(winners) == 1 else ""


def _tokens(text: str) -> Counter[str]:
    return Counter(re.findall(r"\w+", text.lower()))


def _f1(said: Counter[str], described: Counter[str]) -> float:
    total = said.total() + described.total()
    return 2 * (said & described).total() / total if total else 0.0
