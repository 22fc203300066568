"""MIA-DPO, stage three: where the model looked while it answered, and how sure it was.

Paper: Liu et al., arXiv 2410.17637; authors' code Liuziyu77/MIA-DPO, commit a85c51a. One
teacher-forced forward per response gives both (`data_tools.mia.forced`); or they were collected
while the model answered, and are taken from there.
"""

from __future__ import annotations

import math
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from data_tools.mia.forced import Forced, force
from data_tools.mia.perplexity import perplexity
from data_tools.mia.prompting import Prompted, context_length, prompted
from data_tools.mia.ratios import Regions
from data_tools.mia.records import SEQUENCE
from data_tools.records import Outcome
from data_tools.stages import Record, batched, planned
from mmlm.errors import ImageReadError, InputError
from mmlm.inputs import prepare

__all__ = ["ScoreSettings", "ScoreStage", "check_answers"]

_WINDOW = 8
"""Prompts of like length are scored together within so many batches."""


@dataclass(frozen=True)
class ScoreSettings:
    """How responses are scored.

    Attributes:
        attention: `forward` measures it in a teacher-forced forward pass; `answer` takes what was
            measured while the model answered (`mmlm data mia answer --answer.attention true`).
        perplexity: `forward` takes the probabilities of the written tokens from the same pass;
            `answer` those that were noted while the model answered (greedy: the same tokens), and
            the pass ends behind the layer, at about half the cost.
        layer: Decoder layer, from 0; None: 16 of 32 (authors), else round(L/2).
        batch_size: Responses per forward pass; >= 1. Halved by itself where memory runs out.
        parity: The authors' rules: means over the keys of each image, collages cut into equal
            blocks, perplexity from the most probable token of every step.
    """

    attention: Literal["forward", "answer"] = "forward"
    perplexity: Literal["forward", "answer"] = "forward"
    layer: int | None = None
    batch_size: int = 8
    parity: bool = False

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: Names the field and what is allowed.
        """
        for name in ("attention", "perplexity"):
            if getattr(self, name) not in ("forward", "answer"):
                raise ValueError(f"{name} must be forward or answer, got {getattr(self, name)!r}")
        if self.attention == "answer" and self.perplexity == "forward":
            raise ValueError("perplexity must be answer where attention is: there is no forward")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.layer is not None and self.layer < 0:
            raise ValueError(f"layer must not be negative, got {self.layer}")

    @property
    def needs_model(self) -> bool:
        """Whether there is a forward pass at all."""
        return self.attention == "forward"

    @property
    def facts(self) -> dict[str, Any]:
        """What determines the lines beside the model; the batch size does not."""
        facts = asdict(self)
        del facts["batch_size"]
        return facts


@dataclass(frozen=True)
class _Job:
    """A response that is scored: its prompt, its tokens, the length of both together."""

    prompt: Prompted
    tokens: tuple[int, ...]
    length: int


class ScoreStage:
    """Scores responses.

    Statuses: ok, empty_response, no_attention, too_long, unreadable_image, refused,
    image_token_in_response, out_of_memory.

    Args:
        model: A Hugging Face vision-language model; None if the settings need none.
        processor: Its processor.
        root: Folder that paths of pictures are relative to.
        settings: How responses are scored.
        plan: All records of the run. Batches are then always cut from them, also when only some
            are left to do: the last bits of a score depend on what is beside it.
    """

    kinds: tuple[str, ...] = ("scores",)

    def __init__(
        self,
        model: Any,
        processor: Any,
        root: Path,
        settings: ScoreSettings,
        plan: Sequence[Record] | None = None,
    ) -> None:
        self._model, self._processor, self._root = model, processor, root
        self._settings, self._plan = settings, plan
        self._image_ids: tuple[int, ...] = ()
        if model is not None:
            from mmlm.engine.anatomy import Anatomy
            from mmlm.probes.image_attention import central_layer

            anatomy = Anatomy(model)
            self._context = context_length(model)
            self._regions = Regions(model, processor)
            self._image_ids = anatomy.image_ids
            given = settings.layer
            self._layer = central_layer(anatomy.n_layers) if given is None else given

    def process(self, records: Iterable[Record]) -> Iterator[Outcome]:
        """Scores records; see `data_tools.stages.Stage`."""
        for window, wanted in planned(records, self._plan, _WINDOW * self._settings.batch_size):
            yield from (one for one in self._window(window, wanted) if one.id in wanted)

    def _window(self, window: Sequence[Record], wanted: Collection[str]) -> Iterator[Outcome]:
        jobs: list[_Job] = []
        for record in window:
            found = self._job(record)
            if isinstance(found, Outcome):
                yield found
            else:
                jobs.append(found)
        # The longest first: that is where memory runs out.
        jobs.sort(key=lambda job: -job.length)
        for batch in batched(jobs, self._settings.batch_size):
            if not any(job.prompt.record["id"] in wanted for job in batch):
                continue
            start = time.perf_counter()
            forced = self._force(batch)
            seconds = (time.perf_counter() - start) / len(batch)
            for job, one in zip(batch, forced, strict=True):
                yield self._outcome(job, one, seconds)

    def _job(self, record: Record) -> _Job | Outcome:
        """What has to run for a record, or its outcome if nothing has to or can."""
        name = record["id"]
        if record["n_tokens"] < 2 or not record["response"].strip():
            layer = None if self._model is None else self._layer
            return _outcome(name, "empty_response", _line(name, layer))
        if not self._settings.needs_model:
            return self._from_answer(record)
        tokens = tuple(record.get("tokens") or self._tokens(record["response"]))
        if set(tokens) & set(self._image_ids):
            return Outcome(name, "image_token_in_response")
        try:
            prompt = prompted(record, self._root, record["corrupt_target"])
            length = record.get("prompt_tokens") or self._prepared([prompt])["input_ids"].shape[1]
        except ImageReadError:
            return Outcome(name, "unreadable_image")
        except (ValueError, ZeroDivisionError):
            return Outcome(name, "refused")
        if self._context is not None and length >= self._context:
            return Outcome(name, "too_long")
        return _Job(prompt, tokens, length + len(tokens))

    def _tokens(self, response: str) -> list[int]:
        """Tokens of a response that came from elsewhere, with the end token."""
        ids: list[int] = self._processor.tokenizer(response, add_special_tokens=False)["input_ids"]
        end = self._model.generation_config.eos_token_id
        end = end[0] if isinstance(end, list) else end
        return ids if end is None else [*ids, end]

    def _prepared(self, prompts: Sequence[Prompted]) -> dict[str, Any]:
        return prepare(
            self._processor,
            [prompt.conversation for prompt in prompts],
            [list(prompt.pictures) for prompt in prompts],
            device=self._model.device,
            dtype=self._model.dtype,
        )

    def _force(self, batch: Sequence[_Job]) -> list[Forced | None]:
        """Results in order; None where memory does not suffice even for one alone."""
        import torch

        try:
            return list(
                force(
                    self._model,
                    self._processor,
                    self._prepared([job.prompt for job in batch]),
                    [job.tokens for job in batch],
                    layer=self._layer,
                    maps=any(job.prompt.record["format"] != SEQUENCE for job in batch),
                    probabilities=self._settings.perplexity == "forward",
                )
            )
        except torch.OutOfMemoryError:
            if len(batch) == 1:
                return [None]
        half = len(batch) // 2
        return [*self._force(batch[:half]), *self._force(batch[half:])]

    def _outcome(self, job: _Job, forced: Forced | None, seconds: float) -> Outcome:
        record, parity = job.prompt.record, self._settings.parity
        name = record["id"]
        if forced is None:
            return Outcome(name, "out_of_memory", {}, seconds)
        ratios = self._regions.ratios(job.prompt, forced.attention, parity=parity)
        if self._settings.perplexity == "answer":
            ppl = perplexity([record["log_max"]])
        else:
            ppl = perplexity((forced.log_max if parity else forced.log_probs) or ())
        line = _line(name, self._layer, ratios, record["target_index"], ppl)
        return _outcome(name, "no_attention" if ratios is None else "ok", line, seconds)

    def _from_answer(self, record: Record) -> Outcome:
        """A score from what was collected while the model answered."""
        measured = record["attention"]
        ratios = measured["parity" if self._settings.parity else "ratios"]
        ppl = perplexity([record["log_max"]])
        line = _line(record["id"], measured["layer"], ratios, record["target_index"], ppl)
        return _outcome(record["id"], "no_attention" if ratios is None else "ok", line)


def check_answers(records: Sequence[Record], settings: ScoreSettings) -> None:
    """Refuses settings that need what the answers do not hold.

    Raises:
        InputError: Says how to answer again so that they do.
    """
    for record in records:
        if settings.perplexity == "answer" and "log_max" not in record:
            raise InputError(
                f"The answer of {record['id']!r} holds no probabilities.",
                advice="Score with --score.perplexity forward.",
            )
        measured = record.get("attention")
        if settings.attention == "answer" and measured is None:
            raise InputError(
                f"The answer of {record['id']!r} holds no attention.",
                advice="Answer with --answer.attention true, or score with --score.attention "
                "forward.",
            )


def _line(
    name: str,
    layer: int | None,
    ratios: Sequence[float] | None = None,
    target: int = 1,
    ppl: float | None = None,
) -> dict[str, Any]:
    """A line of the kind ``scores``, see `data_tools.mia.records.Score`."""
    rounded = [_short(ratio) for ratio in ratios or ()]
    return {
        "id": name,
        "ratio": rounded[target - 1] if rounded else None,
        "ratios": rounded,
        "ppl": None if ppl is None or not math.isfinite(ppl) else _short(ppl),
        "layer": layer,
    }


def _outcome(name: str, status: str, line: Mapping[str, Any], seconds: float = 0.0) -> Outcome:
    return Outcome(name, status, {"scores": [line]}, seconds)


def _short(x: float) -> float:
    """Six digits: what the last bits of a batched pass hold is noise."""
    return float(f"{x:.6g}")
