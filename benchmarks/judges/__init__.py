"""Judges: models (or people) that read an answer and say what they make of it.

A benchmark turns every answer into a `JudgePrompt` and gets one `Verdict` back for each: the reply,
or a status with the reason why there is none. A judge that fails is counted, never guessed and
never an exception that would lose the replies that were already paid for. Nothing here is called
in scoring unless the user asks for it.

Numbers made with different judges are not comparable (GPT-4 of March and of November 2023 differ
by more than most methods do), so `Judge.name`, model and parameters, belongs into the name of
every result.

* `ScriptedJudge`: replies from a file or a function; human labels, batch interfaces, tests.
* `benchmarks.judges.http.ChatJudge`: any server that speaks OpenAI's chat completions.
* `benchmarks.judges.local.LocalJudge`: a Hugging Face language model on this machine.
* `benchmarks.judges.cache.CachedJudge`: keeps the replies of another judge on the disk.
"""

from __future__ import annotations

import hashlib
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.base import read_records
from mmlm.chat_server.wire import valid_text
from mmlm.errors import InputError

__all__ = [
    "Judge",
    "JudgePrompt",
    "ScriptedJudge",
    "Verdict",
    "WatchedJudge",
    "count_failures",
    "judge_name",
    "prompt_key",
    "read_script",
]


@dataclass(frozen=True, slots=True)
class JudgePrompt:
    """What a judge is asked.

    Attributes:
        id: Identifies the prompt within one call of `Judge.ask`.
        text: The user's message; "" for none.
        system: The system message; "" for none.
        attempt: 0 for the first question; a number from 1 asks the same thing anew, e.g. because
            the reply could not be parsed. Replies of different attempts are cached side by side.
    """

    id: str
    text: str
    system: str = ""
    attempt: int = 0

    @property
    def messages(self) -> list[dict[str, str]]:
        """The prompt as chat messages: role and content; empty ones are left out.

        Half surrogate pairs, which JSON can carry and UTF-8 cannot, become question marks.
        """
        parts = (("system", self.system), ("user", self.text))
        return [{"role": role, "content": valid_text(text)} for role, text in parts if text]


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a prompt.

    Attributes:
        id: Id of the prompt.
        reply: What the judge said; None if it failed.
        status: "ok" or "failed".
        reason: Why there is no reply; "" if there is one.
        cached: Whether the reply was given in an earlier call.
    """

    id: str
    reply: str | None
    status: Literal["ok", "failed"] = "ok"
    reason: str = ""
    cached: bool = False

    @classmethod
    def failed(cls, identifier: str, reason: str) -> Verdict:
        """A prompt without reply."""
        return cls(identifier, None, "failed", reason)


class Judge(ABC):
    """Something that replies to prompts.

    A judge implements `verdicts`; benchmarks call `ask`.

    Attributes:
        model: What replies, e.g. "gpt-4-0314".
        parameters: What else determines a reply, as plain JSON, e.g. {"temperature": 0}.
    """

    model: str
    parameters: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Model and parameters, for the names of results."""
        return judge_name(self.model, self.parameters)

    @abstractmethod
    def verdicts(self, prompts: Sequence[JudgePrompt]) -> Iterator[Verdict]:
        """Gives verdicts as they arrive, in any order, at most one for each prompt.

        Raises:
            InputError: If no reply can be had at all and nothing was lost: a wrong key, a wrong
                address. Whatever concerns single prompts is a failed verdict.
        """

    def ask(self, prompts: Sequence[JudgePrompt]) -> list[Verdict]:
        """One verdict for each prompt, in the order of the prompts.

        Raises:
            ValueError: If two prompts have the same id.
            InputError: If the judge cannot be asked at all.
        """
        ids = [prompt.id for prompt in prompts]
        if len(set(ids)) != len(ids):
            double = next(name for name, count in Counter(ids).items() if count > 1)
            raise ValueError(f"Two prompts have the id {double!r}.")
        if not prompts:
            return []
        found = {verdict.id: verdict for verdict in self.verdicts(prompts)}
        return [found.get(name) or Verdict.failed(name, "no verdict") for name in ids]


class ScriptedJudge(Judge):
    """Replies from a table or a function: people's labels, a batch interface's output, tests.

    Args:
        replies: Reply by prompt id, or a function of the prompt; None stands for no reply.
        model: Name of who replied.
    """

    def __init__(
        self,
        replies: Mapping[str, str] | Callable[[JudgePrompt], str | None],
        model: str = "scripted",
    ) -> None:
        self.model = model
        self.parameters: Mapping[str, Any] = {}
        self._reply = replies if callable(replies) else lambda prompt: replies.get(prompt.id)

    def verdicts(self, prompts: Sequence[JudgePrompt]) -> Iterator[Verdict]:
        """Gives the scripted replies; a prompt without one fails."""
        for prompt in prompts:
            reply = self._reply(prompt)
            if reply is None:
                yield Verdict.failed(prompt.id, "no reply in the script")
            else:
                yield Verdict(prompt.id, reply)


class WatchedJudge(Judge):
    """Another judge, with its verdicts shown as they arrive.

    Args:
        judge: Who is asked.
        watch: Gets the verdicts and their number, and passes them on: a progress bar.
    """

    def __init__(
        self, judge: Judge, watch: Callable[[Iterator[Verdict], int], Iterable[Verdict]]
    ) -> None:
        self.judge = judge
        self.model = judge.model
        self.parameters = judge.parameters
        self._watch = watch

    def verdicts(self, prompts: Sequence[JudgePrompt]) -> Iterator[Verdict]:
        """Passes the verdicts on."""
        yield from self._watch(self.judge.verdicts(prompts), len(prompts))


def read_script(path: str | Path) -> dict[str, str]:
    """Reads the replies of a `ScriptedJudge`: records with ``id`` and ``reply``.

    Raises:
        InputError: If the file cannot be read, a field is missing or of another type, or an id
            occurs twice.
    """
    replies: dict[str, str] = {}
    for number, record in enumerate(read_records(path), start=1):
        identifier, reply = record.get("id"), record.get("reply")
        if not isinstance(identifier, str | int) or not isinstance(reply, str):
            raise InputError(
                f"{path}, record {number}: needs an 'id' and a text in 'reply'.",
                advice='One record per prompt, e.g. {"id": "1", "reply": "Rating: 4"}.',
            )
        if str(identifier) in replies:
            raise InputError(
                f"{path}, record {number}: id {identifier!r} occurs twice.",
                advice="Keep one reply per prompt.",
            )
        replies[str(identifier)] = reply
    return replies


def judge_name(model: str, parameters: Mapping[str, Any]) -> str:
    """Model and parameters in one string, ``gpt-4-0314(temperature=0)``."""
    listed = ",".join(f"{name}={_plain(parameters[name])}" for name in sorted(parameters))
    return f"{model}({listed})" if listed else model


def prompt_key(judge: Judge, prompt: JudgePrompt) -> str:
    """SHA-256 of everything that determines a reply: prompt, attempt, model and parameters."""
    content = {
        "model": judge.model,
        "parameters": dict(judge.parameters),
        "messages": prompt.messages,
        "attempt": prompt.attempt,
    }
    canonical = json.dumps(content, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(canonical.encode("ascii")).hexdigest()


def count_failures(verdicts: Iterable[Verdict]) -> dict[str, int]:
    """How many prompts have no reply, by reason, the most frequent reason first."""
    reasons = Counter(verdict.reason for verdict in verdicts if verdict.status == "failed")
    return dict(reasons.most_common())


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
