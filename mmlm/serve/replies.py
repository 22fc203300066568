"""Answers as OpenAI writes them: one completion, or chunks of one as server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any

from mmlm.serve.jobs import Answer, Job

__all__ = ["END", "Writer", "sse"]

END = b"data: [DONE]\n\n"


def sse(value: dict[str, Any]) -> bytes:
    """One server-sent event."""
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


@dataclass(frozen=True)
class Writer:
    """Writes what comes of one job.

    Args:
        model: The served name, methods included.
        job: The job.
        fingerprint: Identifies the weights.
        tells_usage: Whether a stream ends with the numbers of tokens.
    """

    model: str
    job: Job
    fingerprint: str
    tells_usage: bool = False
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, answer: Answer) -> dict[str, Any]:
        """The completion."""
        message = {"role": "assistant", "content": answer.text, "refusal": None}
        choice = {"index": 0, "message": message, "logprobs": None}
        return self._object(
            "chat.completion", [choice | _ending(answer)], usage=self._usage(answer)
        )

    def first(self) -> bytes:
        """The chunk that opens a stream."""
        return self._chunk({"role": "assistant", "content": "", "refusal": None})

    def piece(self, text: str) -> bytes:
        """A chunk with a piece of the answer."""
        return self._chunk({"content": text})

    def last(self, answer: Answer) -> bytes:
        """The chunks that close a stream."""
        end = self._chunk({}, _ending(answer))
        if self.tells_usage:
            usage = self._usage(answer)
            end += sse(self._object("chat.completion.chunk", [], usage=usage))
        return end + END

    def _chunk(self, delta: dict[str, Any], ending: dict[str, Any] | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": None}
        more = {"usage": None} if self.tells_usage else {}
        return sse(self._object("chat.completion.chunk", [choice | (ending or {})], **more))

    def _object(self, kind: str, choices: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.fingerprint,
            "mmlm_methods": [method.text for method in self.job.methods],
            "choices": choices,
            **more,
        }

    def _usage(self, answer: Answer) -> dict[str, int]:
        asked = self.job.prompt.n_tokens
        return {
            "prompt_tokens": asked,
            "completion_tokens": answer.n_tokens,
            "total_tokens": asked + answer.n_tokens,
        }


def _ending(answer: Answer) -> dict[str, Any]:
    # stop_reason is vLLM's: the stop sequence, which OpenAI does not tell.
    return {"finish_reason": answer.finish, "stop_reason": answer.stopped_by}
