"""Object HalBench's judge: which objects does an answer say are in the picture?"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

from benchmarks.judges import JudgePrompt, judged
from benchmarks.object_halbench.objects import parse_reply
from benchmarks.stored import answer_text, check_ids
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.judges import Judge

__all__ = ["ATTEMPTS", "OBJECTS", "PROMPT", "SHORTEST", "ask", "stored_answer", "stored_question"]

OBJECTS = "objects"
"""What the judge is asked for, in judged lines."""
ATTEMPTS = 3
"""How often a judge is asked until its reply can be read; the official script: 100."""
SHORTEST = 4
"""Words that an answer must have for the judge to be asked; shorter ones name nothing."""

PROMPT = judged.Template(
    """Somebody was shown a picture and answered a question about it. Which objects does the answer
say are visible in the picture?

Question:
{}

Answer:
{}

Take the answer for true, even if it seems unlikely. List every object that it names as being in
the picture, and no object that it does not name. Give the bare name of each object, without
colour, material, size, number or any other property. Reply with a JSON list of texts and nothing
else, for example ["dog", "traffic light"]; if the answer names no visible object, reply with [].
""",
    "mmlm-prompt",
)
"""Ours, to the same effect as the authors'; `judged.read_template` reads theirs from a file."""


def ask(
    lines: Sequence[Mapping[str, Any]],
    judge: Judge,
    *,
    template: judged.Template = PROMPT,
    role: Literal["system", "user"] = "system",
    attempts: int = ATTEMPTS,
) -> list[dict[str, Any]]:
    """Has a judge list the objects of the answers, and adds its replies to the lines.

    Answers of three words or fewer are not sent. A reply without a JSON list is asked for again.

    Args:
        lines: Stored answers with their questions.
        judge: Who is asked.
        template: The prompt with places for question and answer.
        role: Message that holds the prompt. The authors send it as system message; some servers
            and chat templates want a user message. Other than "system" goes into the name.
        attempts: How often the judge is asked for a list.

    Raises:
        InputError: If a line lacks its answer or question, or the judge cannot be asked at all.
    """
    check_ids(lines)
    wording = template.name if role == "system" else f"{template.name}-as-{role}"
    waiting: dict[str, str] = {}
    for number, line in enumerate(lines, start=1):
        text = stored_answer(line, number)
        if text is not None and len(text.split()) >= SHORTEST:
            waiting[line["id"]] = template.fill(stored_question(line, number), text)
    result = [dict(line) for line in lines]
    for attempt in range(attempts):
        prompts = {
            name: JudgePrompt(name, "", filled, attempt)
            if role == "system"
            else JudgePrompt(name, filled, "", attempt)
            for name, filled in waiting.items()
        }
        result = judged.add_verdicts(result, judge, OBJECTS, prompts, template=wording)
        replies = {line["id"]: judged.reply(line, OBJECTS) for line in result}
        waiting = {
            name: filled
            for name, filled in waiting.items()
            if (reply := replies[name]) is not None and parse_reply(reply) is None
        }
        if not waiting:
            break
    return result


def stored_answer(line: Mapping[str, Any], number: int) -> str | None:
    """The answer as the authors' script reads it; None if the line holds an error instead.

    Raises:
        InputError: If it holds neither.
    """
    text = answer_text(line, number)
    return None if text is None else text.replace("Assistant:", "").strip()  # as officially


def stored_question(line: Mapping[str, Any], number: int) -> str:
    """The question in a line.

    Raises:
        InputError: If there is none.
    """
    question = line.get("question")
    if not isinstance(question, str):
        raise InputError(
            f"Line {number} ({line.get('id')!r}) has no text in 'question'.",
            advice="Score files of `mmlm bench object-halbench`, or add --official.",
        )
    return question
