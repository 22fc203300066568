"""The anchor of mDPO and OPA-DPO by itself: the chosen answer must not get less likely.

Papers: mDPO, arXiv 2406.11839; "Mitigating Hallucinations in Large Vision-Language Models
via DPO: On-Policy Data Hold the Key" (OPA-DPO), Yang et al., CVPR 2025, arXiv 2501.09695.
Sources read: the repositories luka-group/mDPO and zhyang2226/OPA-DPO; no code is copied.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import logsigmoid

from training.losses import ExtraLoss, Passes

__all__ = ["Anchor"]


@dataclass(frozen=True, kw_only=True)
class Anchor(ExtraLoss):
    """Adds ``-log sigma(beta l_w - delta)`` to the main loss.

    Idea:
        DPO only widens the gap between two answers; both may get less likely than under the
        reference. The anchor asks for a reward of the chosen answer above delta.
    Cost:
        None: it reads the main pass, and works with a reference cache.
    Parameters:
        weight: Factor on the term, > 0. Default 1 (coefficient of OPA-DPO's script).
        delta: Reward that is asked for, finite. Default 0 (both papers).
    Differs:
        OPA-DPO's code computes it token by token and also anchors the corrected answer from
        above; here the reward is that of the whole answer.

    Raises:
        ValueError: For a parameter out of range.
    """

    delta: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("delta")

    def __call__(self, passes: Passes) -> tuple[Tensor, dict[str, float]]:
        """The mean over chosen answers; logs ``anchor/reached``, the share above delta."""
        rewards = passes.beta * passes.ratios()[0]
        reached = (rewards.detach() > self.delta).float().mean().item()
        return -logsigmoid(rewards - self.delta).mean(), {"anchor/reached": reached}
