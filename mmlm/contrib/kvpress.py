"""Runs presses of NVIDIA's kvpress under the installed transformers. kvpress is not imported here.

    from kvpress import KnormPress

    with compat(model), KnormPress(0.5)(model):
        model.generate(**inputs)

Its hooks read ``cache_position``, which transformers no longer hands to attention modules; this
hands it on. The page *Shorter caches with kvpress* says which versions were tried.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from mmlm.errors import InputError, UnsupportedModel

__all__ = ["compat"]


@contextmanager
def compat(model: Any) -> Iterator[Any]:
    """Gives every attention module of the decoder its ``cache_position``, for the block.

    Args:
        model: A Hugging Face model that generates, with or without vision.

    Yields:
        The same model.

    Raises:
        UnsupportedModel: If it has no attention modules that keep a cache.
        InputError: At a forward pass over several rows, or over padding: presses do not look at
            the attention mask, so that padded keys would compete for places in the cache.
    """
    modules = [part for part in model.modules() if _keeps_cache(part)]
    if not modules:
        raise UnsupportedModel(
            f"{type(model).__name__} has no attention modules that keep a cache.",
            advice="kvpress needs a decoder of transformers with `layer_idx` on its attention.",
        )
    with ExitStack() as stack:
        handle = model.register_forward_pre_hook(_one_row, with_kwargs=True)
        stack.callback(handle.remove)
        for part in modules:
            handle = part.register_forward_pre_hook(_with_positions, with_kwargs=True)
            stack.callback(handle.remove)
        yield model


def _keeps_cache(part: Any) -> bool:
    named = type(part).__name__.endswith("Attention")
    return named and isinstance(getattr(part, "layer_idx", None), int)


def _one_row(model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses what presses would get wrong without a word."""
    given = kwargs.get("input_ids", args[0] if args else None)
    given = kwargs.get("inputs_embeds") if given is None else given
    if given is not None and given.shape[0] != 1:
        raise InputError(
            f"kvpress cannot run on a batch of {given.shape[0]} rows: rows would differ from "
            "what they are alone.",
            advice="Generate one prompt at a time.",
        )
    mask = kwargs.get("attention_mask")
    if mask is not None and mask.ndim == 2 and not bool(mask.all()):
        raise InputError(
            "kvpress cannot run on padding: padded keys would compete for places in the cache.",
            advice="Generate one prompt at a time, without padding.",
        )


def _with_positions(
    part: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Positions of the new keys in this layer's cache, which a press may have shortened."""
    import torch

    cache = kwargs.get("past_key_values")
    if cache is None or kwargs.get("cache_position") is not None:
        return None
    states = kwargs.get("hidden_states", args[0] if args else None)
    past = int(cache.get_seq_length(part.layer_idx))
    positions = torch.arange(past, past + states.shape[1], device=states.device)
    return args, {**kwargs, "cache_position": positions}
