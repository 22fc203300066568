"""The generator without any cache of its own: a fresh prompt for every step, ``model.generate``.

What everybody would write first. The prefix-cached generator must give the same samples; decoding
methods run through this one, because they have to see a prompt from its first token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import mmlm
from data_tools.generators import GeneratorError, Sample, SentenceGenerator, SentenceRequest
from data_tools.generators.common import (
    Limits,
    check_sampling,
    describe,
    never_drawn,
    refusals,
)
from data_tools.generators.prompts import CaptionPrompts
from mmlm.decoding_settings import GenerateSettings, generation_config
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    import torch

    from mmlm.engine.method import Method

__all__ = ["NaiveGenerator"]


class NaiveGenerator(SentenceGenerator):
    """Samples next sentences with ``model.generate``, one request after the other.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor, with a chat template.
        max_new_tokens: At most this many tokens per sentence; >= 1. A sample that has not ended by
            then is no sentence.
        methods: Decoding methods that are attached while sampling.

    Raises:
        ValueError: If ``max_new_tokens`` is not positive.
    """

    def __init__(
        self,
        model: Any,
        processor: Any,
        *,
        max_new_tokens: int = 512,
        methods: Sequence[Method] = (),
    ) -> None:
        from data_tools.generators.drawing import Stops

        self._model = model
        self._processor = processor
        self._methods = tuple(methods)
        self._prompts = CaptionPrompts(processor)
        self._limits = Limits(model, max_new_tokens)
        self._stops = Stops.of(model, processor)
        self._never = never_drawn(model)

    @property
    def facts(self) -> Mapping[str, Any]:
        """What determines the samples."""
        return describe(self._model, self._processor, self._limits, self._methods)

    def sample_sentences(
        self, requests: Sequence[SentenceRequest], n: int, temperature: float
    ) -> list[list[Sample] | GeneratorError]:
        """Samples ``n`` next sentences for every request."""
        check_sampling(n, temperature)
        results: list[list[Sample] | GeneratorError] = []
        for request in requests:
            try:
                results.append(self._sample(request, n, temperature))
            except GeneratorError as error:
                results.append(error)
        return results

    def _sample(self, request: SentenceRequest, n: int, temperature: float) -> list[Sample]:
        import torch

        model, picture = self._model, request.picture
        with refusals(picture):
            inputs = self._prompts.inputs(
                picture.image, request.question, request.context, model.device, model.dtype
            )
        length = inputs["input_ids"].shape[1]
        limit = self._limits.room(picture, length)
        settings = GenerateSettings(max_new_tokens=limit, do_sample=True)
        config = generation_config(model, settings)
        config.eos_token_id = sorted(self._stops.sentence | self._stops.caption)
        config.num_return_sequences = n
        try:
            with (
                torch.random.fork_rng(devices=[]),
                torch.inference_mode(),
                mmlm.attach(model, *self._methods, processor=self._processor),
            ):
                tokens = model.generate(
                    **inputs,
                    generation_config=config,
                    logits_processor=[self._drawing(request.seed, n, temperature, length)],
                )
        except torch.OutOfMemoryError as error:
            raise GeneratorError(f"out of memory with {n} samples of one picture") from error
        except LayoutError as error:
            raise GeneratorError(str(error)) from error
        tokenizer = self._processor.tokenizer
        rows = [_up_to_stop(row, self._stops) for row in tokens[:, length:].tolist()]
        return [self._stops.sample(tokenizer, row) for row in rows]

    def _drawing(self, seed: int, n: int, temperature: float, length: int) -> Any:
        """A logits processor that leaves one token to choose: the one that is drawn."""
        import torch

        from data_tools.generators.drawing import Uniforms, draw

        uniforms = Uniforms(seed, n)

        def only_drawn(ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            numbers = torch.from_numpy(uniforms.at(ids.shape[1] - length)).to(scores.device)
            token = draw(scores, numbers[:, None], temperature, self._never)
            return torch.full_like(scores, float("-inf")).scatter(1, token, 0.0)

        return only_drawn


def _up_to_stop(ids: list[int], stops: Any) -> list[int]:
    """A row without what stands behind its first stop token."""
    end = next((i for i, token in enumerate(ids) if token in stops), len(ids) - 1)
    return ids[: end + 1]
