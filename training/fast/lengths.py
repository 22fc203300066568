"""A guard: the states that a preference loss gets must be as many as the tokens that it scores.

TRL multiplies ``last_hidden_state[:, :-1]`` with the head and scores ``input_ids[:, 1:]`` with it.
A model that removes visual tokens and gives fewer states would be scored at wrong positions, or
fail with a message about shapes far from the cause.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.utils.hooks import RemovableHandle

from training.errors import FastPathRefused
from training.fast.models import PRUNING, anatomy_of

__all__ = ["install_length_guard"]


def install_length_guard(model: nn.Module) -> RemovableHandle:
    """Lets every pass of a model without a cache check its own length.

    Args:
        model: A vision-language model, in its wrappers or not.

    Returns:
        ``handle.remove()`` takes the guard off.

    Raises:
        UnsupportedModel: If the model's parts cannot be found.
    """
    return anatomy_of(model).composite.register_forward_hook(_compare, with_kwargs=True)


def _compare(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
    ids = kwargs.get("input_ids")
    if ids is None or kwargs.get("use_cache") or kwargs.get("past_key_values") is not None:
        return
    length = output[0].shape[1]
    if length != ids.shape[1]:
        raise FastPathRefused(
            f"{type(module).__name__} got rows of {ids.shape[1]} tokens and gave states for "
            f"{length}: {PRUNING}.",
            advice="A preference loss needs one state per token of input_ids.",
        )
