"""Episodes of ``mmlm data micl`` as conversations: one question that shows all, one answer.

The demonstrations with their answers belong to the question, so the only thing that is learned is
the query's answer and the end token behind it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmlm.errors import InputError
from mmlm.inputs import message
from training.sft.rows import Conversation

__all__ = ["EpisodeRow", "by_set", "read_episodes", "split"]

_ADVICE = "Give episodes.jsonl as `mmlm data micl --split support` wrote it."


@dataclass(frozen=True)
class EpisodeRow:
    """An episode to learn from.

    Attributes:
        task: Its task.
        shots: Its demonstrations, with or without pictures.
        conversation: All of it.
    """

    task: str
    shots: int
    conversation: Conversation


def read_episodes(files: Sequence[str]) -> list[EpisodeRow]:
    """Reads episodes; the pictures themselves are not opened.

    Args:
        files: ``episodes.jsonl``; paths of pictures are relative to the file.

    Raises:
        InputError: If a file cannot be read or a line is no episode, or its query is not of the
            support split (tests are asked from the other one); names file, line and field.
    """
    rows = []
    for file in files:
        try:
            lines = Path(file).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(
                f"The episodes {file!r} cannot be read: {error}.", advice=_ADVICE
            ) from (error)
        rows += [_row(line, file, n) for n, line in enumerate(lines, start=1) if line.strip()]
    if not rows:
        raise InputError(f"There are no episodes in {', '.join(map(repr, files))}.", advice=_ADVICE)
    return rows


def _row(line: str, file: str, number: int) -> EpisodeRow:
    place = f"{file}:{number}"
    try:
        given = json.loads(line)
    except json.JSONDecodeError as error:
        raise InputError(f"{place}: it is no JSON ({error}).", advice=_ADVICE) from error
    kinds = {"id": str, "task": str, "prompt": str, "answer": str, "images": list}
    if not isinstance(given, Mapping):
        raise InputError(f"{place}: an episode is an object, not {given!r}.", advice=_ADVICE)
    for name, kind in kinds.items():
        if not isinstance(given.get(name), kind) or not given[name]:
            raise InputError(f"{place}: {name!r} is {given.get(name)!r}.", advice=_ADVICE)
    try:
        question = message("user", given["prompt"], len(given["images"]), marked=True)
    except InputError as error:
        raise InputError(f"{place}: {error}", advice=_ADVICE) from error
    answer = {"role": "assistant", "content": [{"type": "text", "text": given["answer"]}]}
    folder = Path(file).parent
    images = tuple(str((folder / str(path)).absolute()) for path in given["images"])
    return EpisodeRow(
        task=given["task"],
        shots=len(given.get("demo_answers") or []),
        conversation=Conversation(given["id"], images, (question, answer), place),
    )


def by_set(
    rows: Sequence[EpisodeRow], tasks: Sequence[str] | None, joint: bool
) -> dict[str, list[EpisodeRow]]:
    """The rows of each set of factors, by its name: one per task, or one for all ("joint").

    Args:
        rows: All episodes.
        tasks: The tasks that are used, None for all there are.
        joint: One set.

    Raises:
        InputError: If there is no episode of a task.
    """
    there = list(dict.fromkeys(row.task for row in rows))
    wanted = there if tasks is None else list(tasks)
    if missing := [name for name in wanted if name not in there]:
        raise InputError(
            f"There are no episodes of {', '.join(missing)}; there are some of {', '.join(there)}.",
            advice="Make them with `mmlm data micl --split support`, or leave the task out.",
        )
    chosen = [row for row in rows if row.task in wanted]
    if joint:
        return {"joint": chosen}
    return {name: [row for row in chosen if row.task == name] for name in wanted}


def split(rows: Sequence[EpisodeRow], held_out: float) -> dict[str, list[Any]]:
    """The conversations to learn from and, of every task, the last share to stop early by.

    Raises:
        InputError: If that leaves a task without one of the two.
    """
    found: dict[str, list[Any]] = {"train": [], "eval": []}
    for name in dict.fromkeys(row.task for row in rows):
        own = [row.conversation for row in rows if row.task == name]
        kept = len(own) - round(held_out * len(own))
        if not 0 < kept < len(own):
            raise InputError(
                f"held_out = {held_out} of {len(own)} episodes of {name!r} leaves {kept} to learn "
                f"from and {len(own) - kept} to stop by.",
                advice="Make more episodes, or choose another share.",
            )
        found["train"] += own[:kept]
        found["eval"] += own[kept:]
    return found
