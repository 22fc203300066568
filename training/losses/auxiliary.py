"""HA-DPO's auxiliary term: the usual instruction loss on other data beside the pairs.

Paper: "Beyond Hallucinations: Enhancing LVLMs through Hallucination-Aware Direct Preference
Optimization", Zhao et al., 2023, arXiv 2311.16839.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from training.losses import ExtraLoss, Passes

__all__ = ["AuxiliarySFT"]


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
