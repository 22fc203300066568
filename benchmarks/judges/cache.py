"""Replies of judges on the disk: nothing is paid for twice, and results can be made again offline.

One file per model and parameters, one JSON line per reply, synced to the disk as soon as it
arrives. A killed run loses no more than the requests that were under way; the next one goes on
from there. The files are plain enough to be published beside a result.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.judges import Judge, JudgePrompt, Verdict, prompt_key
from mmlm.errors import InputError
from mmlm.records import RecordFile

__all__ = ["CachedJudge"]


class CachedJudge(Judge):
    """Asks another judge only what it has not been asked before.

    Only replies are kept: what failed is asked again the next time. The address of a server is
    not part of a prompt's key, so replies survive a change of the provider; two different models
    under one name need two folders.

    Args:
        judge: Who is asked.
        folder: Where the replies are kept; created when there is something to keep.
        offline: Never ask: a prompt without a stored reply fails.
    """

    def __init__(self, judge: Judge, folder: Path, *, offline: bool = False) -> None:
        self.judge = judge
        self.model = judge.model
        self.parameters = judge.parameters
        self.offline = offline
        self.path = folder / f"{_file_name(judge)}.jsonl"

    def verdicts(self, prompts: Sequence[JudgePrompt]) -> Iterator[Verdict]:
        """Gives the stored replies first, then the new ones as they arrive.

        Raises:
            InputError: If the file is damaged or another process is asking the same judge, if
                there are no stored replies at all though only those may be used, or if the judge
                cannot be asked.
        """
        waiting: dict[str, list[JudgePrompt]] = {}
        for prompt in prompts:
            waiting.setdefault(prompt_key(self.judge, prompt), []).append(prompt)
        if self.offline and not self.path.is_file():
            raise InputError(
                f"There are no stored replies of {self.name} in {str(self.path.parent)!r}.",
                advice="Name the folder of the earlier run, or let the judge be asked.",
            )
        self.path.parent.mkdir(parents=True, exist_ok=True)
        records = RecordFile(self.path, self._run())
        yield from _stored(records, waiting)
        if self.offline:
            for same in waiting.values():
                yield from (Verdict.failed(p.id, "no stored reply") for p in same)
        elif waiting:
            with records:
                # Between reading and locking another process may have got replies.
                yield from _stored(records, waiting)
                yield from self._ask(records, waiting)

    def _ask(self, records: RecordFile, waiting: dict[str, list[JudgePrompt]]) -> Iterator[Verdict]:
        """Asks each different prompt once; the reply is on the disk before anyone sees it."""
        keys = {same[0].id: key for key, same in waiting.items()}
        for verdict in self.judge.verdicts([same[0] for same in waiting.values()]):
            key = keys[verdict.id]
            first, *others = waiting[key]
            if verdict.reply is not None:
                records.append([_record(key, first, verdict.reply)])
            yield verdict
            for prompt in others:
                yield Verdict(prompt.id, verdict.reply, verdict.status, verdict.reason, True)

    def _run(self) -> dict[str, Any]:
        return {
            "command": "judge",
            "model": self.model,
            "parameters": dict(self.parameters),
        }


def _stored(records: RecordFile, waiting: dict[str, list[JudgePrompt]]) -> Iterator[Verdict]:
    """Verdicts for the prompts with a stored reply, which are taken off the waiting list."""
    for key in [key for key in waiting if key in records.done]:
        reply = records.done[key].get("reply")
        if not isinstance(reply, str):
            raise InputError(
                f"{records.path}: the reply {key[:12]}... is {reply!r}, not a text.",
                advice="Remove the line, or restore the file.",
            )
        for prompt in waiting.pop(key):
            yield Verdict(prompt.id, reply, cached=True)


def _record(key: str, prompt: JudgePrompt, reply: str) -> dict[str, Any]:
    # The prompt stands beside its reply for people; the key alone decides.
    return {"id": key, "messages": prompt.messages, "attempt": prompt.attempt, "reply": reply}


def _file_name(judge: Judge) -> str:
    content = json.dumps([judge.model, dict(judge.parameters)], sort_keys=True, allow_nan=False)
    plain = re.sub(r"[^\w.-]+", "-", judge.model).strip("-.")[-60:] or "judge"
    return f"{plain}-{hashlib.sha256(content.encode()).hexdigest()[:8]}"
