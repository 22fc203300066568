"""What the generators with a model in this process have in common: limits, refusals, facts."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from data_tools.generators import GeneratorError
from data_tools.pictures import Picture
from mmlm.errors import MmlmError

if TYPE_CHECKING:
    import torch

    from mmlm.engine.method import Method

__all__ = ["Limits", "check_sampling", "describe", "never_drawn", "refusals"]


class Limits:
    """How long prompts and sentences may be.

    Args:
        model: A Hugging Face model.
        max_new_tokens: At most this many tokens per sentence; >= 1.

    Raises:
        ValueError: If it is less.
    """

    def __init__(self, model: Any, max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
        self.max_new_tokens = max_new_tokens
        config = model.config.get_text_config()
        self._context: int | None = getattr(config, "max_position_embeddings", None)

    def room(self, picture: Picture, length: int) -> int:
        """Tokens that a sentence behind a prompt may have.

        Raises:
            GeneratorError: If the prompt fills the model's context.
        """
        if self._context is None:
            return self.max_new_tokens
        if length >= self._context:
            raise GeneratorError(
                f"the prompt of picture {picture.id!r} has {length} tokens, and the model's "
                f"context {self._context}"
            )
        return min(self.max_new_tokens, self._context - length)


def check_sampling(n: int, temperature: float) -> None:
    """Checks what a caller of ``sample_sentences`` asks for.

    Raises:
        ValueError: If ``n`` or ``temperature`` is not positive.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    if not (math.isfinite(temperature) and temperature > 0):
        raise ValueError(f"temperature must be positive and finite, got {temperature}")


@contextlib.contextmanager
def refusals(picture: Picture) -> Iterator[None]:
    """What a processor or a template raises for one picture concerns its request only."""
    try:
        yield
    # As in mmlm.runner: a picture of 1 x 1000 pixels is a ValueError or a division by zero.
    except (ValueError, ZeroDivisionError, MmlmError) as error:
        raise GeneratorError(f"picture {picture.id!r} was refused: {error}") from error


def never_drawn(model: Any) -> torch.Tensor:
    """Placeholders of pictures: a caption that held one would be a prompt with another picture."""
    import torch

    from mmlm.engine.anatomy import Anatomy

    return torch.tensor(Anatomy(model).image_ids, device=model.device)


def describe(
    model: Any, processor: Any, limits: Limits, methods: Sequence[Method]
) -> dict[str, Any]:
    """What determines the samples, as JSON values.

    Args:
        model: The model.
        processor: Its processor.
        limits: How long sentences may be.
        methods: What is attached while sampling.
    """
    from data_tools.generators.drawing import SENTENCE_END
    from mmlm.runner import fingerprint

    template = processor.chat_template or getattr(processor.tokenizer, "chat_template", None)
    return {
        "model": _name(model),
        "weights": fingerprint(model),
        "processor": _hash(processor.to_dict()),
        "tokenizer": _hash(processor.tokenizer.get_vocab()),
        "template": _hash(template),
        "dtype": str(model.dtype).removeprefix("torch."),
        "max_new_tokens": limits.max_new_tokens,
        "methods": [method.text for method in methods],
        "sentence_end": SENTENCE_END,
    }


def _name(model: Any) -> str:
    """What the model is called, on every machine: a folder may lie elsewhere on another."""
    from mmlm.model.checkpoint import EMBEDDED, embedded_folder

    name = str(getattr(model.config, "_name_or_path", "")) or type(model).__name__
    if Path(name) == embedded_folder():
        return EMBEDDED
    return Path(name).name if Path(name).is_dir() else name


def _hash(value: Any) -> str:
    content = json.dumps(value, sort_keys=True, default=str).encode()
    return f"sha256:{hashlib.sha256(content).hexdigest()[:32]}"
