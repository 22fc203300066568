"""HA-DPO's auxiliary term: the usual instruction loss on other data beside the pairs.

Paper: "Beyond Hallucinations: Enhancing LVLMs through Hallucination-Aware Direct Preference
Optimization", Zhao et al., 2023, arXiv 2311.16839.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from training.losses import ExtraLoss, Passes

__all__ = ["AuxiliaryBatches", "AuxiliarySFT"]


class AuxiliaryBatches:
    """Batches of other data, each drawn by the seed of its pass.

    A batch depends on the seed alone, so a resumed run gets the batches that an uninterrupted one
    would have got, and every process its own. Rows of a batch differ from each other; over the run
    rows are drawn with replacement.

    Args:
        examples: What the collator takes, such as `training.sft.data.Examples`.
        collate: Turns a list of examples into a batch with `labels`, such as
            `training.sft.collator.SFTCollator`.
        size: Examples of a batch, at least 1; all of them if there are fewer.

    Raises:
        ValueError: There are no examples, or size is less than 1.
    """

    def __init__(
        self,
        examples: Sequence[Any],
        collate: Callable[[Sequence[Any]], Mapping[str, Any]],
        size: int,
    ) -> None:
        if size < 1 or not len(examples):
            raise ValueError(
                "auxiliary data needs at least one example and a batch size of at least 1, "
                f"got {len(examples)} examples and size {size!r}"
            )
        self._examples, self._collate, self._size = examples, collate, size

    def __call__(self, seed: int) -> Mapping[str, Any]:
        """The batch of a pass.

        Args:
            seed: `Passes.step_seed`.
        """
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randperm(len(self._examples), generator=generator)[: self._size]
        return self._collate([self._examples[number] for number in drawn.tolist()])


@dataclass(frozen=True, kw_only=True)
class AuxiliarySFT(ExtraLoss):
    """Adds gamma times the cross-entropy of an instruction batch.

    Idea:
        Preference training on one kind of question wears away the rest. The model's usual
        instruction data, a batch in every step, keeps it.
    Equations:
        ``L = L_DPO + gamma L_aux``, ``L_aux`` the mean of -log p over the scored tokens of the
        batch; gamma is `weight`.
    Cost:
        One more pass of the policy, with gradient, over the auxiliary rows.
    Parameters:
        weight: gamma, > 0. Default 1 (HA-DPO's MiniGPT-4 script).
    Differs:
        TRL's "sft" has the same form over the chosen answers; this is over other data.

    Raises:
        ValueError: For a parameter out of range.
    """

    needs_auxiliary: ClassVar[bool] = True

    def __call__(self, passes: Passes) -> tuple[Tensor, dict[str, float]]:
        """The mean over scored tokens, 0 if there are none; logs ``auxiliary/tokens``."""
        logps, mask = passes.auxiliary()
        tokens = mask.sum()
        loss = -torch.where(mask > 0, logps, 0).sum() / tokens.clamp(min=1)
        return loss, {"auxiliary/tokens": tokens.item()}
