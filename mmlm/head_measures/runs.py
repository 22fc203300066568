"""What both maps of heads need: answers of a model with probes attached, and facts about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["check_threshold", "facts_of", "generated", "inputs_of"]


def inputs_of(
    model: Any, processor: Any, messages: Sequence[tuple[str, list[Any]]]
) -> dict[str, Any]:
    """Model inputs of questions with their pictures."""
    from mmlm.inputs import message, prepare

    return prepare(
        processor,
        [[message("user", prompt, len(images))] for prompt, images in messages],
        [images for _, images in messages],
        device=model.device,
        dtype=model.dtype,
    )


def generated(
    model: Any, processor: Any, inputs: dict[str, Any], probes: Sequence[Any], length: int
) -> list[tuple[list[int], dict[str, Any]]]:
    """New tokens (the end token included) and records of every row."""
    import mmlm
    from mmlm.runner import GenerateSettings, generation_config

    config = generation_config(model, GenerateSettings(max_new_tokens=length))
    ends = model.generation_config.eos_token_id
    with mmlm.attach(model, *probes, processor=processor):
        new = model.generate(**inputs, generation_config=config)[:, inputs["input_ids"].shape[1] :]
        tokens = [_ended(row, ends) for row in new.tolist()]
        records = mmlm.measured(model, [len(row) for row in tokens])
    return list(zip(tokens, records, strict=True))


def _ended(tokens: list[int], ends: int | Sequence[int] | None) -> list[int]:
    """The tokens up to the first that ends the answer."""
    own = {ends} if isinstance(ends, int) else set(ends or ())
    last = next((i for i, token in enumerate(tokens) if token in own), len(tokens) - 1)
    return tokens[: last + 1]


def facts_of(model: Any, more: Mapping[str, Any] | None) -> dict[str, Any]:
    """What a map's file says about the model, and more."""
    from mmlm.runner import fingerprint

    return {
        "model": str(getattr(model.config, "_name_or_path", "")),
        "weights": fingerprint(model),
        "dtype": str(model.dtype).removeprefix("torch."),
        "attention": str(model.config._attn_implementation),
        **(more or {}),
    }


def check_threshold(threshold: float) -> None:
    """Raises ValueError for a threshold outside (0, 1)."""
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must be above 0 and below 1, got {threshold}")
