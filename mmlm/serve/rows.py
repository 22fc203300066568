"""One row of a batch while the model generates: its text as it grows, and where it ends."""

from __future__ import annotations

import os.path
from collections.abc import Callable, Collection, Sequence

from mmlm.serve.jobs import Answer, Job

__all__ = ["Row"]

UNREADABLE = "\ufffd"
"""What tokenizers write for a character whose last bytes are in the next token."""


class Row:
    """The answer to one job, token by token.

    Args:
        job: The job; gets the answer as soon as it is complete, whatever the rest of the batch
            still does.
        ends: Tokens that end an answer.
        decode: Tokens to text, without special tokens.
    """

    def __init__(
        self, job: Job, ends: Collection[int], decode: Callable[[Sequence[int]], str]
    ) -> None:
        self.job = job
        self.over = False
        self._ends = ends
        self._decode = decode
        self._tokens: list[int] = []
        self._before = ""
        self._reads = job.choosing.streams or bool(job.choosing.stops)

    def take(self, token: int) -> bool:
        """Adds a token; returns whether the row is over."""
        if self.over or self.job.cancelled:
            self.over = True
            return True
        self._tokens.append(token)
        finish = ""
        if token in self._ends:
            finish = "stop"
        elif len(self._tokens) == self.job.prompt.max_tokens:
            finish = "length"
        if finish or self._reads:
            self._read(finish)
        return self.over

    def close(self) -> None:
        """There are no more tokens: what there is, is the answer."""
        if not (self.over or self.job.cancelled):
            self._read("length")

    def _read(self, finish: str) -> None:
        text = self._decode(self._tokens).lstrip()
        choosing = self.job.choosing
        met = [(text.find(stop), stop) for stop in choosing.stops if stop in text]
        if met:
            place, stop = min(met)
            text = text[: place + len(stop)] if choosing.keeps_stop else text[:place].rstrip()
            self._finish(Answer(text, len(self._tokens), "stop", stop))
        elif finish:
            self._finish(Answer(text.rstrip(), len(self._tokens), finish))
        elif choosing.streams:
            self._send(self._sure(text))

    def _finish(self, answer: Answer) -> None:
        self.over = True
        if self.job.choosing.streams:
            self._send(answer.text)
        self.job.send(answer)

    def _send(self, text: str) -> None:
        if piece := text[len(self.job.sent) :]:
            self.job.send(piece)

    def _sure(self, text: str) -> str:
        """The part of the text that no later token changes.

        A token may still change what the one before it looks like (half a character, a blank that
        is taken back before "n't"), so that is sure on which two readings agree. A stop sequence
        may have begun at the end, and blanks there may be the answer's last.
        """
        both = os.path.commonprefix([self._before, text])  # noqa: RUF071  (texts, no paths)
        sure = both.rstrip(UNREADABLE)
        self._before = text
        begun = [
            length
            for stop in self.job.choosing.stops
            for length in range(1, len(stop))
            if sure.endswith(stop[:length])
        ]
        return sure[: len(sure) - max(begun, default=0)].rstrip()
