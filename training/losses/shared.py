"""What several extra losses need: halves of a batch, sums, comparisons, random draws."""

from __future__ import annotations

import zlib
from collections.abc import Mapping

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.losses import Passes

__all__ = ["chosen_rows", "compare", "random_stream", "sum_ratio", "without_picture"]


def chosen_rows(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The chosen half of a batch, pictures included.

    A collator lists everything twice, first for the chosen and then for the rejected answers, so
    the first half of every tensor belongs to the chosen ones: rows, pictures, tiles, or patches.
    """
    kept = {key: value for key, value in inputs.items() if not key.startswith("ref_")}
    return {key: value.chunk(2)[0] for key, value in kept.items()}


def sum_ratio(
    policy: Float[Tensor, "R T"], reference: Float[Tensor, "R T"], mask: Num[Tensor, "R T"]
) -> Float[Tensor, "R"]:
    """Log ratio of whole answers, ``sum_t mask_t (log pi(y_t) - log pi_ref(y_t))``."""
    return torch.where(mask > 0, policy - reference, 0).sum(1)


def compare(
    better: Float[Tensor, "B"], worse: Float[Tensor, "B"] | float, beta: float
) -> Float[Tensor, ""]:
    """``mean -log sigma(beta (l_better - l_worse))``: DPO's loss of any two log ratios."""
    return -logsigmoid(beta * (better - worse)).mean()


def without_picture(
    passes: Passes, chosen: Float[Tensor, "B"], inputs: Mapping[str, Tensor]
) -> tuple[Tensor, dict[str, float]]:
    """``-log sigma(beta (l_w(v) - l_w(v')))``: the chosen answer fits v better than v'.

    Args:
        passes: The step; one more pass of policy and reference over B rows.
        chosen: [B] l_w(v), from `Passes.ratios`.
        inputs: `chosen_rows` with v' in the place of v.

    Returns:
        The mean over the batch, a scalar, and numbers for the log: the share of pairs in which the
        reward under v is the larger one, and the mean difference of rewards. A row without a
        picture adds a constant ln 2 and no gradient.
    """
    half = len(passes.mask) // 2
    other = sum_ratio(*passes.again(inputs), passes.mask[:half])
    margin = passes.beta * (chosen - other).detach()
    numbers = {
        "picture/accuracies": (margin > 0).float().mean().item(),
        "picture/margins": margin.mean().item(),
    }
    return compare(chosen, other, passes.beta), numbers


def random_stream(passes: Passes, name: str) -> torch.Generator:
    """Random numbers of one loss in one step: others than another loss draws, and repeatable.

    On the CPU, so that every device gets the same numbers.
    """
    seed = zlib.crc32(f"{name} {passes.step_seed}".encode())
    return torch.Generator().manual_seed(seed)
