"""The model's thread: takes waiting jobs, as many as fit together, and answers them in one batch.

Jobs fit together if the same methods answer them; lengths, temperatures, seeds and stop sequences
may differ (`mmlm.serve.rows`, `mmlm.serve.sampling`). The one that waits longest always goes next,
and those of its kind whose prompts are most like its own in length go with it: nobody waits for
ever, and little is padding.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch

import mmlm
from mmlm.errors import IncompatibleMethods, MmlmError, UnsupportedModel
from mmlm.inputs import prepare
from mmlm.runner import GenerateSettings, generation_config
from mmlm.serve.jobs import Job
from mmlm.serve.refusals import Refusal, failed, unfit
from mmlm.serve.rows import Row
from mmlm.serve.sampling import RowSampler

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["Worker", "stands_alone"]

_log = logging.getLogger("mmlm.serve")


def stands_alone(methods: Sequence[Method]) -> bool:
    """Whether requests with these methods are answered one at a time.

    Some settings let a row's answer depend on the other rows. A search takes tokens back, so its
    rows cannot end at different times.
    """
    return any("search" in method.sites or method.mixes_rows for method in methods)


class Worker:
    """Answers jobs in a thread of its own.

    Args:
        model: A Hugging Face LVLM; nobody else may use it while the worker runs.
        processor: Its processor; idem.
        batch_size: Most jobs that are answered together.

    Attributes:
        last_seconds: How long the last batch took.
    """

    def __init__(self, model: Any, processor: Any, batch_size: int) -> None:
        self.last_seconds = 0.0
        self._model = model
        self._processor = processor
        self._batch_size = batch_size
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._closing = False
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="model", daemon=True)
        ends = model.generation_config.eos_token_id
        self._ends = frozenset([ends] if isinstance(ends, int) else ends or [])

    @property
    def waiting(self) -> int:
        """Jobs that wait."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Jobs in the batch that is being answered."""
        return len(self._running)

    @property
    def alive(self) -> bool:
        """Whether jobs are answered at all."""
        return self._thread.is_alive() and not self._closing

    def start(self) -> None:
        """Starts the thread."""
        self._thread.start()

    def submit(self, job: Job) -> None:
        """Puts a job behind those that wait.

        Raises:
            Refusal: If the worker is being closed.
        """
        with self._changed:
            if not self.alive:
                raise Refusal(503, "The server is shutting down.", code="shutting_down")
            self._waiting.append(job)
            self._changed.notify()

    def cancel(self, job: Job) -> None:
        """Nobody waits for this job any more: it is dropped, or ends with its next token."""
        with self._changed:
            job.cancelled = True
            if job in self._waiting:
                self._waiting.remove(job)

    def close(self) -> None:
        """Ends the thread after the batch that is running; jobs that wait are refused."""
        with self._changed:
            self._closing = True
            for job in self._waiting:
                job.send(Refusal(503, "The server is shutting down.", code="shutting_down"))
            self._waiting.clear()
            self._changed.notify()
        self._thread.join()

    # ---- the model's thread --------------------------------------------------------------------

    def _run(self) -> None:
        while True:
            jobs = self._next()
            if not jobs:
                return
            start = time.monotonic()
            self._answer(jobs)
            self.last_seconds = time.monotonic() - start
            with self._changed:
                self._running = []
            del jobs  # with their pictures, not only when the next one comes

    def _next(self) -> list[Job]:
        """Jobs that fit together; none once the worker is closed."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closing)
            if self._closing:
                return []
            first, *others = self._waiting
            size = 1 if stands_alone(first.methods) else self._batch_size
            length = first.prompt.n_tokens
            alike = [job for job in others if job.methods == first.methods]
            alike.sort(key=lambda job: abs(job.prompt.n_tokens - length))
            self._running = [first, *alike[: size - 1]]
            self._waiting = [job for job in self._waiting if job not in self._running]
            return list(self._running)

    def _answer(self, jobs: list[Job]) -> None:
        """Answers jobs together; if that fails, each of those that have no answer alone."""
        rows = [Row(job, self._ends, self._decode) for job in jobs]
        try:
            self._generate(rows)
            return
        except (IncompatibleMethods, UnsupportedModel) as error:  # concerns all of them alike
            refusal = unfit(error, "mmlm_methods", "invalid_method")
        except MmlmError as error:
            refusal = unfit(error, "messages")
        except torch.OutOfMemoryError:
            refusal = Refusal(
                503,
                "The device ran out of memory. Send fewer or smaller pictures, or a lower "
                "max_tokens.",
                code="out_of_memory",
            )
        except Exception:
            # The thread must outlive whatever one request makes of the model; the log has it all.
            _log.exception("A batch of %d failed.", len(jobs))
            refusal = failed("The model failed at this request; the server's log says how.")
        left = [row.job for row in rows if not row.over]
        if len(jobs) == 1:
            for job in left:
                job.send(refusal)
            return
        for job in left:
            self._answer([job])

    def _decode(self, tokens: Sequence[int]) -> str:
        text: str = self._processor.decode(tokens, skip_special_tokens=True)
        return text

    def _generate(self, rows: list[Row]) -> None:
        jobs = [row.job for row in rows]
        methods, choices = jobs[0].methods, [job.choosing for job in jobs]
        inputs = self._inputs(jobs)
        begin = inputs["input_ids"].shape[1]
        longest = max(job.prompt.max_tokens for job in jobs)
        searches = any("search" in method.sites for method in methods)

        def over(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            if searches:  # its rows are beams, and their last tokens not the answer's
                done = [jobs[0].cancelled] * len(ids)
            else:
                last = ids[:, -1].tolist()
                done = [row.take(token) for row, token in zip(rows, last, strict=True)]
            return torch.tensor(done, device=ids.device)

        draws = any(choosing.temperature > 0 for choosing in choices)
        processors = [RowSampler(choices, self._model.device)] if draws else []
        with mmlm.attach(self._model, *methods, processor=self._processor):
            tokens = self._model.generate(
                **inputs,
                generation_config=generation_config(
                    self._model, GenerateSettings(max_new_tokens=longest)
                ),
                stopping_criteria=[over],
                logits_processor=processors,
            )
        if searches:
            for token in tokens[0, begin:].tolist():
                rows[0].take(token)
        for row in rows:
            row.close()

    def _inputs(self, jobs: Sequence[Job]) -> dict[str, torch.Tensor]:
        """One job's inputs were made when it was checked; several are laid out together."""
        model, prompts = self._model, [job.prompt for job in jobs]
        if len(prompts) == 1:
            made = prompts[0].inputs
            return {
                name: value.to(model.device, model.dtype)
                if value.is_floating_point()
                else value.to(model.device)
                for name, value in made.items()
            }
        return prepare(
            self._processor,
            [prompt.conversation for prompt in prompts],
            [prompt.pictures for prompt in prompts],
            device=model.device,
            dtype=model.dtype,
            begun=[prompt.begun for prompt in prompts],
        )
