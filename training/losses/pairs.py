"""From token log-probabilities to what the preference losses read.

B pairs make 2B rows [chosen x B; rejected x B] of S positions; column t of a tensor
[2B, T = S - 1] belongs to token t + 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Num
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.losses.settings import LossSettings

__all__ = ["Mask", "Pairs", "Tokens", "answer_logps", "divergence", "make_pairs"]

Tokens = Float[Tensor, "R T"]
Mask = Num[Tensor, "R T"]


@dataclass(frozen=True)
class Pairs:
    """What the losses read of a batch: row 0 of each [2, B] is the chosen side, row 1 the rejected.

    Attributes:
        policy: [2, B] log p of whole answers under the policy.
        reference: [2, B] likewise under the reference.
        lengths: [2, B] scored tokens.
        chosen_tokens: [n] log p of every scored token of the chosen answers of all pairs.
        scores: [2, B] f(l), see `divergence`.
    """

    policy: Tensor
    reference: Tensor
    lengths: Tensor
    chosen_tokens: Tensor
    scores: Tensor

    @property
    def ratios(self) -> Tensor:
        """[2, B] l."""
        return self.policy - self.reference

    @property
    def margin(self) -> Tensor:
        """[B] h."""
        return self.scores[0] - self.scores[1]

    @property
    def mean_margin(self) -> Tensor:
        """[B] h with each score divided by the length of its answer."""
        means = self.scores / self.lengths.clamp(min=1)
        return means[0] - means[1]


def answer_logps(logps: Tokens, mask: Mask, ld_alpha: float | None = None) -> Float[Tensor, "2 B"]:
    """Log p of whole answers: the sum over scored tokens.

    Args:
        logps: [2B, S - 1].
        mask: [2B, S - 1], 1 where scored.
        ld_alpha: Factor on the tokens beyond the length of the pair's shorter answer (LD-DPO,
            arXiv 2409.06411); None is 1.
    """
    weights = mask.to(logps)
    if ld_alpha is not None:
        shorter = mask.sum(1).view(2, -1).amin(0).repeat(2)[:, None]  # [2B, 1]
        weights = weights * torch.where(mask.cumsum(1) <= shorter, 1.0, ld_alpha)
    # An unscored column may hold anything, also what a product with 0 would not remove.
    return torch.where(mask > 0, logps, 0).mul(weights).sum(1).view(2, -1)


def divergence(ratios: Tensor, settings: LossSettings) -> Tensor:
    """f(l) of f-DPO (arXiv 2309.16240), up to a constant that cancels in h.

    reverse_kl ``l``; forward_kl ``1 - exp(-l)``; js_divergence ``log 2 + log sigma(l)``;
    alpha_divergence ``(exp((a - 1) l) - 1) / (a - 1)``, which is l at a = 1.
    """
    kind, a = settings.f_divergence_type, settings.f_alpha_divergence_coef
    if kind == "forward_kl":
        return 1 - torch.exp(-ratios)
    if kind == "js_divergence":
        return math.log(2) + logsigmoid(ratios)
    if kind == "alpha_divergence" and abs(a - 1) >= 1e-6:
        # TRL's bound, so that the exponential stays finite in single precision.
        return (torch.exp(((a - 1) * ratios).clamp(max=80)) - 1) / (a - 1)
    return ratios


def make_pairs(policy: Tokens, reference: Tokens, mask: Mask, settings: LossSettings) -> Pairs:
    """Sums token log-probabilities [2B, S - 1] to what the losses read."""
    both = [answer_logps(logps, mask, settings.ld_alpha) for logps in (policy, reference)]
    half = len(mask) // 2
    return Pairs(
        policy=both[0],
        reference=both[1],
        lengths=mask.sum(1).view(2, -1),
        chosen_tokens=policy[:half][mask[:half] > 0],
        scores=divergence(both[0] - both[1], settings),
    )
