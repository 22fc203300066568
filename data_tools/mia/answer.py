"""MIA-DPO, stage two: the model answers; what it says may become the rejected answer.

Paper: Liu et al., arXiv 2410.17637. Greedy decoding, 512 new tokens; records whose ground truth has
512 characters or more are left out (authors' code: Liuziyu77/MIA-DPO, commit a85c51a).
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.mia.prompting import Prompted, context_length, prompted
from data_tools.mia.ratios import Regions
from data_tools.records import Outcome
from data_tools.stages import Record, planned
from mmlm.batching import batches
from mmlm.errors import ImageReadError, MmlmError
from mmlm.inputs import prepare
from mmlm.runner import GenerateSettings, Request, Result, generate_batches

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["LONGEST_TRUTH", "AnswerSettings", "AnswerStage"]

LONGEST_TRUTH = 512
"""Ground truths of so many characters or more are left out (authors)."""
_WINDOW = 8
"""Prompts of like length are answered together within so many batches."""


@dataclass(frozen=True)
class AnswerSettings:
    """How the model answers.

    Attributes:
        max_new_tokens: At most this many new tokens; >= 1. 512 in the authors' code.
        batch_size: Prompts per forward pass; >= 1. Halved by itself where memory runs out.
        corrupt_target: Standard deviation, in grey levels, of Gaussian noise on the target; > 0.
            None (ours) asks about the clean picture; the authors' code uses 225 for collages.
        attention: Measure the attention on the pictures while answering, one row of one layer
            per token; then scoring needs no forward pass of its own.
        layer: Decoder layer that is measured, from 0; None: 16 of 32 (authors), else round(L/2).
    """

    max_new_tokens: int = 512
    batch_size: int = 8
    corrupt_target: float | None = None
    attention: bool = False
    layer: int | None = None

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: Names the field and what is allowed.
        """
        for name in ("max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        noise = self.corrupt_target
        if noise is not None and not (math.isfinite(noise) and noise > 0):
            raise ValueError(f"corrupt_target must be none or positive, got {noise}")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer must not be negative, got {self.layer}")

    @property
    def facts(self) -> dict[str, Any]:
        """What determines the lines beside the model; the batch size does not."""
        facts = asdict(self)
        del facts["batch_size"]
        return facts


class AnswerStage:
    """Answers instructions.

    Statuses: ok, long_answer, too_long, unreadable_image, refused, out_of_memory.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor.
        root: Folder that paths of pictures are relative to.
        settings: How it answers.
        name: The model's name, for the lines.
        plan: All records of the run. Batches are then always cut from them, also when only some
            are left to do: the last bits of an answer's numbers depend on what is beside it.
    """

    kinds: tuple[str, ...] = ("answers",)

    def __init__(
        self,
        model: Any,
        processor: Any,
        root: Path,
        settings: AnswerSettings,
        name: str,
        plan: Sequence[Record] | None = None,
    ) -> None:
        from mmlm import Confidence, ImageAttention

        self._model, self._processor, self._root = model, processor, root
        self._settings, self._name, self._plan = settings, name, plan
        self._context = context_length(model)
        self._regions = Regions(model, processor)
        self._probes: tuple[Method, ...] = (Confidence(),)
        if settings.attention:
            self._probes += (ImageAttention(layer=settings.layer, maps=True),)

    def process(self, records: Iterable[Record]) -> Iterator[Outcome]:
        """Answers records; see `data_tools.stages.Stage`."""
        for window, wanted in planned(records, self._plan, _WINDOW * self._settings.batch_size):
            yield from (one for one in self._window(window, wanted) if one.id in wanted)

    def _window(self, window: Sequence[Record], wanted: Collection[str]) -> Iterator[Outcome]:
        ready: dict[str, tuple[Prompted, int]] = {}
        for record in window:
            found = self._ready(record)
            if isinstance(found, Outcome):
                yield found
            else:
                ready[record["id"]] = found
        requests = [
            Request(key, prompt.pictures, prompt.text, marked=True)
            for key, (prompt, _) in ready.items()
        ]
        for batch in batches(self._processor, requests, self._settings.batch_size):
            if not any(request.id in wanted for request in batch):
                continue
            start = time.perf_counter()
            answered = self._answer(batch)
            seconds = (time.perf_counter() - start) / len(batch)
            for request, result in zip(batch, answered, strict=True):
                yield self._outcome(*ready[request.id], result, seconds)

    def _ready(self, record: Record) -> tuple[Prompted, int] | Outcome:
        """A record's prompt and its number of tokens, or why it is not asked."""
        if len(record["answer"]) >= LONGEST_TRUTH:
            return Outcome(record["id"], "long_answer")
        try:
            prompt = prompted(record, self._root, self._settings.corrupt_target)
        except ImageReadError:
            return Outcome(record["id"], "unreadable_image")
        try:
            inputs = prepare(self._processor, [prompt.conversation], [list(prompt.pictures)])
        except (ValueError, ZeroDivisionError, MmlmError):
            return Outcome(record["id"], "refused")  # e.g. a picture of 1 x 1000 pixels
        tokens = inputs["input_ids"].shape[1]
        if self._context is not None and tokens >= self._context:
            return Outcome(record["id"], "too_long")
        return prompt, tokens

    def _answer(self, batch: Sequence[Request]) -> list[Result | None]:
        """Results in order; None where memory does not suffice even for one alone."""
        import torch

        settings = GenerateSettings(
            max_new_tokens=self._settings.max_new_tokens, batch_size=len(batch)
        )
        try:
            (results,) = generate_batches(
                self._model, self._processor, batch, self._probes, settings
            )
        except MmlmError as error:
            if not isinstance(error.__cause__, torch.OutOfMemoryError):
                raise
            if len(batch) == 1:
                return [None]
            half = len(batch) // 2
            return [*self._answer(batch[:half]), *self._answer(batch[half:])]
        by_id = {result.id: result for result in results}
        return [by_id[request.id] for request in batch]

    def _outcome(
        self, prompt: Prompted, tokens: int, result: Result | None, seconds: float
    ) -> Outcome:
        if result is None:
            return Outcome(prompt.record["id"], "out_of_memory", {}, seconds)
        if result.error is not None:
            return Outcome(result.id, "refused", {}, seconds)
        line = {
            "id": result.id,
            "response": result.text,
            "n_tokens": result.n_tokens,
            "tokens": list(result.tokens),
            "prompt_tokens": tokens,
            "log_max": result.measures["confidence"]["log_max"],
            "corrupt_target": self._settings.corrupt_target,
            "model": self._name,
            "decode": {"do_sample": False, "max_new_tokens": self._settings.max_new_tokens},
        }
        if self._settings.attention:
            line["attention"] = self._attention(prompt, result.measures["image_attention"])
        return Outcome(result.id, "ok", {"answers": [line]}, seconds)

    def _attention(self, prompt: Prompted, measured: Mapping[str, Any]) -> dict[str, Any]:
        """What was measured while answering, by both rules, for the scoring stage."""
        if not measured["queries"]:
            return {"layer": measured["layer"], "ratios": None, "parity": None}
        return {
            "layer": measured["layer"],
            "ratios": self._regions.ratios(prompt, measured),
            "parity": self._regions.ratios(prompt, measured, parity=True)
            if self._regions.has_parity(measured)
            else None,
        }
