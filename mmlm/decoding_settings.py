"""How answers are generated: the settings that users choose, and nothing else.

A checkpoint may ship a temperature, a penalty or a minimum length; what is not chosen here is set
to its neutral value, so that greedy means greedy for every model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import GenerationConfig

__all__ = ["GenerateSettings", "generation_config"]


@dataclass(frozen=True)
class GenerateSettings:
    """How answers are generated; nothing is taken over from the checkpoint's own defaults.

    Attributes:
        max_new_tokens: At most this many new tokens per answer; >= 1.
        do_sample: Draw tokens at random; otherwise the most probable one is taken.
        num_beams: Beams of a beam search; 1 is none.
        temperature: Divides the logits before sampling; > 0. Needs do_sample.
        top_p: Sample from the smallest set of tokens with this probability; in (0, 1]. Needs
            do_sample.
        seed: Seed of the sampling and of random parts of methods; >= 0.
        batch_size: Requests per forward pass; >= 1.
    """

    max_new_tokens: int = 512
    do_sample: bool = False
    num_beams: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0
    batch_size: int = 8

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: For a value out of range, or a sampling parameter without sampling.
        """
        for name in ("max_new_tokens", "num_beams", "batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise ValueError(
                f"temperature must be positive and finite, got {self.temperature} "
                "(for the most probable token set do_sample to false)"
            )
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p}")
        if not self.do_sample and (self.temperature, self.top_p) != (1.0, 1.0):
            raise ValueError("temperature and top_p work with do_sample=true only")


def generation_config(model: Any, settings: GenerateSettings) -> GenerationConfig:
    """The settings as transformers wants them, with the checkpoint's own defaults neutralised.

    ``generate`` fills every unset value from the checkpoint's ``generation_config.json``, and
    several checkpoints ship a temperature or a repetition penalty there: their "greedy" would
    differ from everybody else's. Token ids and suppressed tokens stay as the checkpoint has them.

    Args:
        model: A Hugging Face generative model.
        settings: The settings.
    """
    from transformers import GenerationConfig

    own = model.generation_config
    end = own.eos_token_id
    pad = own.pad_token_id
    if pad is None and end is not None:
        pad = end[0] if isinstance(end, list) else end
    # Values that only matter for sampling draw a warning if they are set without it.
    sampling = {"top_k": 0, "min_p": 0.0} if settings.do_sample else {"top_k": 50}
    return GenerationConfig(
        max_new_tokens=settings.max_new_tokens,
        min_new_tokens=0,  # transformers derives min_length from it
        do_sample=settings.do_sample,
        num_beams=settings.num_beams,
        num_return_sequences=1,
        early_stopping=False,
        temperature=settings.temperature,
        top_p=settings.top_p,
        typical_p=1.0,
        epsilon_cutoff=0.0,
        eta_cutoff=0.0,
        repetition_penalty=1.0,
        encoder_repetition_penalty=1.0,
        length_penalty=1.0,
        no_repeat_ngram_size=0,
        encoder_no_repeat_ngram_size=0,
        guidance_scale=1.0,
        use_cache=True,
        pad_token_id=pad,
        **sampling,
    )
