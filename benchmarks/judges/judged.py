"""Answers with what a judge said about them, in one file: scoring needs neither model nor judge.

A judged line is a stored answer with two more fields: ``judge``, the judge's name, and ``judged``,
one entry per question to the judge::

    {"id": "3", ..., "text": "Two dogs.", "judge": "gpt-4-0314(temperature=0.0)",
     "judged": {"rating": {"reply": "... Rating: 5"}}}

An entry without ``reply`` has a ``reason``. Answer and verdict stand in one line, so that a verdict
can never be counted for an answer it was not given for.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.base import read_records
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from benchmarks.judges import Judge, JudgePrompt

    Line = Mapping[str, Any]

__all__ = [
    "Template",
    "add_verdicts",
    "judge_of",
    "judged_path",
    "read_answers",
    "read_template",
    "reply",
    "write_judged",
]


@dataclass(frozen=True)
class Template:
    """A prompt for a judge with places, written ``{}``, for what is judged.

    Attributes:
        text: The prompt.
        name: Goes into the name of the result, because the wording changes verdicts.
    """

    text: str
    name: str = "own-prompt"

    def fill(self, *parts: str) -> str:
        """The prompt with its places filled in order; braces inside the parts stay as they are.

        Raises:
            ValueError: If there are not as many places as parts.
        """
        pieces = self.text.split("{}")
        if len(pieces) != len(parts) + 1:
            raise ValueError(f"{len(parts)} parts for {len(pieces) - 1} places")
        return "".join(x for pair in zip(pieces, (*parts, ""), strict=True) for x in pair)


def read_template(path: Path, parts: Sequence[str]) -> Template:
    """Reads a prompt from a file, e.g. the one the benchmark's authors used.

    Args:
        path: UTF-8 text with one ``{}`` for each part.
        parts: What will be put there, in order; for the message.

    Raises:
        InputError: If the file cannot be read or has another number of places.
    """
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text.", advice="Convert it to UTF-8.") from error
    except OSError as error:
        raise InputError(
            f"{path} cannot be read: {error.strerror}.", advice="Check the path."
        ) from error
    if (places := text.count("{}")) != len(parts):
        raise InputError(
            f"{path} has {places} places {{}}; expected are {len(parts)}: {', '.join(parts)}.",
            advice="Write {} where each of these goes, in this order.",
        )
    return Template(text, f"prompt-{hashlib.sha256(raw).hexdigest()[:8]}")


def add_verdicts(
    lines: Sequence[Line],
    judge: Judge,
    question: str,
    prompts: Mapping[str, JudgePrompt],
    *,
    template: str,
) -> list[dict[str, Any]]:
    """Asks a judge about some of the answers and adds what it said.

    Args:
        lines: Stored answers, judged in other questions or not at all.
        judge: Who is asked.
        question: What the judge is asked for, e.g. "rating"; key of the entry.
        prompts: The prompt of each answer to be judged, by the answer's id.
        template: Name of the prompts' wording.

    Returns:
        All lines, in their order. What another judge said about them before is dropped.

    Raises:
        InputError: If the judge cannot be asked at all.
    """
    name = f"{judge.name}/{template}"
    verdicts = dict(zip(prompts, judge.ask(list(prompts.values())), strict=True))
    judged = []
    for line in lines:
        entries = dict(line["judged"]) if line.get("judge") == name else {}
        if verdict := verdicts.get(line["id"]):
            if verdict.reply is None:
                entries[question] = {"reply": None, "reason": verdict.reason}
            else:
                entries[question] = {"reply": verdict.reply}
        judged.append({**line, "judge": name, "judged": entries})
    return judged


def reply(line: Line, question: str) -> str | None:
    """What the judge said about an answer; None if it was not asked or did not reply."""
    entry = line.get("judged", {}).get(question)
    return None if entry is None else entry.get("reply")


def judge_of(lines: Sequence[Line]) -> str | None:
    """Name of the judge of all lines; None if no line is judged.

    Raises:
        InputError: If there is more than one, a line is not judged, or an entry is damaged.
    """
    names = {line.get("judge") for line in lines}
    if names == {None}:
        return None
    if len(names) > 1 or not all(isinstance(name, str) and name for name in names):
        listed = ", ".join(sorted(str(name or "none") for name in names))
        raise InputError(
            f"The answers were not all judged by the same judge: {listed}.",
            advice="Have all answers judged by one judge; numbers of different judges differ.",
        )
    for number, line in enumerate(lines, start=1):
        entries = line.get("judged")
        if not isinstance(entries, dict) or not all(map(_is_entry, entries.values())):
            raise InputError(
                f"Line {number}: 'judged' does not hold replies of a judge.",
                advice='Expected is e.g. {"rating": {"reply": "Rating: 4"}}.',
            )
    return str(names.pop())


def judged_path(path: Path) -> Path:
    """Where the judged lines of a file of answers stand: ``answers.judged.jsonl``."""
    return path.with_name(f"{path.stem.removesuffix('.judged')}.judged.jsonl")


def write_judged(path: Path, lines: Sequence[Line]) -> None:
    """Writes judged lines; at any moment either the old or the new file is there, whole."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with temporary.open("w", encoding="utf-8") as stream:
        for line in lines:
            stream.write(json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n")
        stream.flush()
        os.fsync(stream.fileno())
    temporary.replace(path)


def read_answers(path: Path) -> list[dict[str, Any]]:
    """Reads stored answers, with the verdicts that stand beside them if there are any.

    Raises:
        InputError: If a file cannot be read, or the judged file is about other answers.
    """
    lines = read_records(path)
    beside = judged_path(path)
    if beside == path or not beside.is_file() or any("judge" in line for line in lines):
        return lines
    judged = read_records(beside)
    added = ("judge", "judged")
    if [{k: v for k, v in line.items() if k not in added} for line in judged] != lines:
        raise InputError(
            f"{beside} holds verdicts on other answers than those in {path}.",
            advice="Have the answers judged again, or move the old verdicts away.",
        )
    return judged


def _is_entry(entry: Any) -> bool:
    return isinstance(entry, dict) and isinstance(entry.get("reply"), str | None)
