"""The default generator: a Hugging Face model in this process that reads every picture once.

All sentences of a caption are drawn behind the same picture and question, and behind a context that
only grows. What the model has read of a caption (keys and values) is kept until `forget`, and a
step reads the new sentence only. All samples of all captions of a call are then drawn together
(`data_tools.generators.sampling`).

The cache is only a cache. What a sample is conditioned on is a *fresh* prompt's token ids, see
`data_tools.generators.prompts`: if the context is tokenised otherwise than before, what is kept is
cut back to where both agree.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from data_tools.generators import GeneratorError, Sample, SentenceGenerator, SentenceRequest
from data_tools.generators.common import (
    Limits,
    check_sampling,
    describe,
    never_drawn,
    refusals,
)
from data_tools.generators.naive import NaiveGenerator
from data_tools.generators.prompts import CaptionPrompts, Stem
from data_tools.pictures import Picture
from mmlm.errors import UnsupportedModel

if TYPE_CHECKING:
    from data_tools.generators.tree import Kept
    from mmlm.engine.method import Method

__all__ = ["HFGenerator"]


@dataclass
class _Entry:
    """What is kept of one picture and question."""

    kept: Kept
    stem: Stem | None


@dataclass(frozen=True)
class _Job:
    """A request on its way."""

    number: int
    request: SentenceRequest

    @property
    def key(self) -> tuple[str, str, str]:
        """The same picture and question."""
        picture = self.request.picture
        return picture.id, picture.sha256, self.request.question


class HFGenerator(SentenceGenerator):
    """Samples next sentences with a Hugging Face vision-language model.

        generator = HFGenerator(*mmlm.load("embedded"))
        request = SentenceRequest(picture, "Describe the image.", context="", seed=0)
        [samples] = generator.sample_sentences([request], n=10, temperature=0.7)

    With methods attached (or built into the model) nothing can be kept: a method must see a prompt
    from its first token, and many collect something there. Each request is then a fresh prompt
    (`NaiveGenerator`), and `facts` says so.

    Args:
        model: A Hugging Face vision-language model in eval mode.
        processor: Its processor, with a chat template.
        max_new_tokens: At most this many tokens per sentence; >= 1; default 512 (the SENTINEL
            authors'). A sample that has not ended by then is no sentence: its text is "", and it
            is not finished.
        methods: Decoding methods that are attached while sampling.
        pictures_at_once: Captions in one forward pass; >= 1.
        keep: Whether what was read is kept. False reads a fresh prompt for every request: slower,
            the same samples.

    Raises:
        ValueError: If a number is out of range.
        UnsupportedModel: If the model's attention takes no masks of ours (flash, flex).
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int = 512,
        methods: Sequence[Method] = (),
        pictures_at_once: int = 16,
        keep: bool = True,
    ) -> None:
        from data_tools.generators.drawing import Stops
        from mmlm.engine.families import FAMILIES

        if pictures_at_once < 1:
            raise ValueError(f"pictures_at_once must be at least 1, got {pictures_at_once}")
        self._model = model
        self._processor = processor
        self._limits = Limits(model, max_new_tokens)
        self._methods = tuple(methods)
        self._at_once = pictures_at_once
        self._keep = keep
        self._fresh: NaiveGenerator | None = None
        if methods or _has_built_in(model):
            self._fresh = NaiveGenerator(
                model, processor, max_new_tokens=max_new_tokens, methods=methods
            )
            return
        _refuse_attention(model)
        self._prompts = CaptionPrompts(processor)
        self._stops = Stops.of(model, processor)
        self._never = never_drawn(model)
        self._known = model.config.model_type in FAMILIES
        self._entries: dict[tuple[str, str, str], _Entry] = {}

    @property
    def facts(self) -> Mapping[str, Any]:
        """What determines the samples. Whether something is kept is none of it."""
        return describe(self._model, self._processor, self._limits, self._methods)

    def sample_sentences(
        self, requests: Sequence[SentenceRequest], n: int, temperature: float
    ) -> list[list[Sample] | GeneratorError]:
        """Samples ``n`` next sentences for every request."""
        import torch

        if self._fresh is not None:
            return self._fresh.sample_sentences(requests, n, temperature)
        check_sampling(n, temperature)
        results: dict[int, list[Sample] | GeneratorError] = {}
        jobs = [_Job(number, request) for number, request in enumerate(requests)]
        with torch.inference_mode():
            for start in range(0, len(jobs), self._at_once):
                some = jobs[start : start + self._at_once]
                self._in_halves(some, results, lambda part: self._sample(part, n, temperature))
        return [results[job.number] for job in jobs]

    def forget(self, pictures: Sequence[Picture]) -> None:
        """Frees what was kept for pictures."""
        if self._fresh is None:
            gone = {(picture.id, picture.sha256) for picture in pictures}
            self._entries = {
                key: entry for key, entry in self._entries.items() if key[:2] not in gone
            }

    def _in_halves(
        self,
        jobs: list[_Job],
        results: dict[int, list[Sample] | GeneratorError],
        work: Callable[[list[_Job]], dict[int, list[Sample] | GeneratorError]],
    ) -> None:
        """Does some jobs together; where memory runs out, each half of them by itself."""
        import torch

        try:
            results |= work(jobs)
            return
        except torch.OutOfMemoryError as error:
            if len(jobs) == 1:
                picture = jobs[0].request.picture
                self.forget([picture])
                results[jobs[0].number] = GeneratorError(
                    f"out of memory with picture {picture.id!r} alone: {error}"
                )
                return
        half = len(jobs) // 2
        self._in_halves(jobs[:half], results, work)
        self._in_halves(jobs[half:], results, work)

    def _sample(
        self, jobs: list[_Job], n: int, temperature: float
    ) -> dict[int, list[Sample] | GeneratorError]:
        from data_tools.generators.drawing import Uniforms
        from data_tools.generators.sampling import Caption, draw_sentences

        results: dict[int, list[Sample] | GeneratorError] = {}
        prompts = self._read(jobs, results)
        captions: dict[int, Caption] = {}
        for job in jobs:
            if (kept := prompts.get(job.number)) is None:
                continue
            limit = self._limits.room(job.request.picture, len(kept.ids))
            uniforms = Uniforms(job.request.seed, n)
            captions[job.number] = Caption(kept, uniforms, limit, [[] for _ in range(n)])
        if captions:
            draw_sentences(
                self._model, list(captions.values()), temperature, self._stops, self._never
            )
        tokenizer = self._processor.tokenizer
        for number, caption in captions.items():
            results[number] = [self._stops.sample(tokenizer, ids) for ids in caption.samples]
        return results

    def _read(
        self, jobs: list[_Job], results: dict[int, list[Sample] | GeneratorError]
    ) -> dict[int, Kept]:
        """Has the model read every prompt; errors go to ``results``."""
        from data_tools.generators.tree import extend

        read: dict[int, Kept] = {}
        longer: list[tuple[_Job, tuple[int, ...]]] = []
        for job in jobs:
            try:
                entry = self._entries.get(job.key) if self._keep else None
                ids = None if entry is None else self._ids(entry, job)
                if entry is None or ids is None or not entry.kept.can_become(ids):
                    read[job.number] = self._read_fresh(job)
                else:
                    self._limits.room(job.request.picture, len(ids))
                    longer.append((job, ids))
            except GeneratorError as error:
                results[job.number] = error
        entries = [self._entries[job.key] for job, _ in longer]
        new = extend(self._model, [entry.kept for entry in entries], [ids for _, ids in longer])
        if new and not self._known:
            self._check(longer[0][0], new[0])
        for (job, _), entry, kept in zip(longer, entries, new, strict=True):
            entry.kept = read[job.number] = kept
        return read

    def _check(self, job: _Job, kept: Kept) -> None:
        """Compares what was read in two parts with a fresh prompt, once, in an unknown family.

        Raises:
            UnsupportedModel: If they differ: what the model reads of a picture then depends on
                what follows it.
        """
        import torch

        entry = self._entries[job.key]
        fresh = self._read_fresh(job)
        self._entries[job.key] = entry
        tolerance = 100 * torch.finfo(self._model.dtype).eps * float(fresh.logits.abs().max())
        difference = float((fresh.logits - kept.logits).abs().max())
        if fresh.ids != kept.ids or difference > tolerance:
            raise UnsupportedModel(
                f"{type(self._model).__name__} reads a prompt otherwise in one part than in two "
                f"(logits differ by {difference:.2g}).",
                advice="Use HFGenerator(..., keep=False).",
            )
        self._known = True

    def _ids(self, entry: _Entry, job: _Job) -> tuple[int, ...] | None:
        """Ids of a fresh prompt; None if only the processor can tell."""
        if entry.stem is None:
            return None
        return self._prompts.ids(entry.stem, job.request.question, job.request.context)

    def _read_fresh(self, job: _Job) -> Kept:
        from data_tools.generators.tree import prefill

        request, model = job.request, self._model
        with refusals(request.picture):
            inputs = self._prompts.inputs(
                request.picture.image, request.question, request.context, model.device, model.dtype
            )
            ids = inputs["input_ids"][0].tolist()
            stem = self._prompts.stem(ids, request.question, request.context)
        self._limits.room(request.picture, len(ids))
        kept = prefill(model, inputs, self._prompts.n_fixed(inputs, self._never))
        if self._keep:
            self._entries[job.key] = _Entry(kept, stem)
        return kept


def _has_built_in(model: Any) -> bool:
    """Whether methods are part of the model."""
    from mmlm.engine.anatomy import unwrap
    from mmlm.engine.attach import BUILT

    return hasattr(unwrap(model), BUILT)


def _refuse_attention(model: Any) -> None:
    from mmlm.engine.masks.kinds import reasons_against_dense_masks

    if reasons := reasons_against_dense_masks(model.config.get_text_config()):
        raise UnsupportedModel(
            f"{type(model).__name__} cannot draw several sentences at once: {'; '.join(reasons)}.",
            advice='Load it with attention "sdpa".',
        )
