"""Every preference loss of TRL 1.16 as a formula: pure functions of token log-probabilities.

A reading aid and a measure: training runs TRL's own code, and the tests hold it against this file.

Letters: y_w and y_l are the chosen and the rejected answer, ``l = log pi(y|x) - log pi_ref(y|x)``
is the log ratio of one (`Pairs.ratios`), ``h = f(l_w) - f(l_l)`` the difference of scores
(`Pairs.margin`; f is the identity unless another divergence is chosen), beta the strength of the
tie to the reference, eps the label smoothing. B pairs make 2B rows [chosen x B; rejected x B] of S
positions; column t of a [2B, S - 1] tensor belongs to token t + 1.

Source: DPO is Rafailov et al., NeurIPS 2023, arXiv 2305.18290; the others are named where they
stand.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import logsigmoid

from training.losses.pairs import Mask, Pairs, Tokens, make_pairs
from training.losses.settings import LossSettings

__all__ = [
    "LOSSES",
    "pair_losses",
    "preference_loss",
    "rewards",
    "wpo_weights",
]


def sigmoid(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """DPO, Eq. 7: ``-log sigma(beta h)``. Label smoothing has no effect."""
    return -logsigmoid(s.beta * pairs.margin)


def hinge(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """SLiC (arXiv 2305.10425) in RSO's form (arXiv 2309.06657): ``max(0, 1 - beta h)``."""
    return torch.relu(1 - s.beta * pairs.margin)


def ipo(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """IPO (arXiv 2310.12036, Eq. 17): ``(h - 1 / (2 beta))^2``, scores per token."""
    return (pairs.mean_margin - 1 / (2 * s.beta)) ** 2


def exo_pair(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """EXO (arXiv 2402.00856, Eq. 16): the divergence of two answers' shares from (1 - eps, eps).

    ``sigma(beta h) (log sigma(beta h) - log(1 - eps))
    + sigma(-beta h) (log sigma(-beta h) - log eps)``.
    """
    z, eps = s.beta * pairs.margin, s.label_smoothing
    won = z.sigmoid() * (logsigmoid(z) - math.log1p(-eps))
    return won + (-z).sigmoid() * (logsigmoid(-z) - math.log(eps))


def nca_pair(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """NCA (arXiv 2402.05369).

    ``-log sigma(beta l_w) - (log sigma(-beta l_w) + log sigma(-beta l_l)) / 2``.
    """
    won, lost = s.beta * pairs.ratios
    return -logsigmoid(won) - 0.5 * logsigmoid(-won) - 0.5 * logsigmoid(-lost)


def robust(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """Robust DPO (arXiv 2403.00409): unbiased if a share eps of the pairs is flipped.

    ``(-(1 - eps) log sigma(beta h) + eps log sigma(-beta h)) / (1 - 2 eps)``.
    """
    z, eps = s.beta * pairs.margin, s.label_smoothing
    return (-(1 - eps) * logsigmoid(z) + eps * logsigmoid(-z)) / (1 - 2 * eps)


def bco_pair(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """BCO (arXiv 2404.04656), without its moving reward shift.

    ``-log sigma(beta l_w) - log sigma(-beta l_l)``.
    """
    won, lost = s.beta * pairs.ratios
    return -logsigmoid(won) - logsigmoid(-lost)


def sppo_hard(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """SPPO (arXiv 2405.00675, Eq. 4.7) with certain winners.

    ``(l_w - 1 / (2 beta))^2 + (l_l + 1 / (2 beta))^2``.
    """
    won, lost = pairs.ratios
    return (won - 0.5 / s.beta) ** 2 + (lost + 0.5 / s.beta) ** 2


def aot(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """AOT (arXiv 2406.05882), paired: quantiles of log p(y_w) - log p(y_l), policy to reference."""
    return _smoothed(
        _sorted_gap(*(logps[0] - logps[1] for logps in (pairs.policy, pairs.reference))), s
    )


def aot_unpaired(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """AOT (arXiv 2406.05882), unpaired: quantiles of l_w to those of l_l."""
    return _smoothed(_sorted_gap(*pairs.ratios), s)


def apo_zero(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """APO-zero (arXiv 2408.06266, Eq. 7): ``1 - sigma(beta l_w) + sigma(beta l_l)``."""
    won, lost = s.beta * pairs.ratios
    return 1 - won.sigmoid() + lost.sigmoid()


def apo_down(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """APO-down (arXiv 2408.06266, Eq. 8): ``sigma(beta l_w) + 1 - sigma(beta (l_w - l_l))``."""
    won, lost = s.beta * pairs.ratios
    return won.sigmoid() + 1 - (won - lost).sigmoid()


def discopop(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """DiscoPOP (arXiv 2406.08414, Eq. 5), z = beta h, m = sigma(z / tau).

    ``-(1 - m) log sigma(z) + m exp(-z)``.
    """
    z = s.beta * pairs.margin
    m = torch.sigmoid(z / s.discopop_tau)
    return -logsigmoid(z) * (1 - m) + torch.exp(-z) * m


def sft(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """Negative log-likelihood per token, over all chosen tokens of the batch; equal for all pairs.

    The second term of RPO (arXiv 2404.19733). A pair counts by its length, so the loss of a batch
    is not the mean of the losses of its pairs.
    """
    return -pairs.chosen_tokens.mean().expand(pairs.policy.shape[1])


def sigmoid_norm(pairs: Pairs, s: LossSettings) -> Float[Tensor, "B"]:
    """DPO with scores per token, as in Tulu 3 (arXiv 2411.15124): ``-log sigma(beta h)``."""
    return -logsigmoid(s.beta * pairs.mean_margin)


LOSSES: dict[str, Callable[[Pairs, LossSettings], Tensor]] = {
    loss.__name__: loss
    for loss in (
        sigmoid,
        hinge,
        ipo,
        exo_pair,
        nca_pair,
        robust,
        bco_pair,
        sppo_hard,
        aot,
        aot_unpaired,
        apo_zero,
        apo_down,
        discopop,
        sft,
        sigmoid_norm,
    )
}
"""Name -> function of the pairs and the settings: the loss of each pair, [B]."""


def wpo_weights(policy: Tokens, log_sum_sq_probs: Tokens, mask: Mask) -> Float[Tensor, "B"]:
    """WPO (arXiv 2406.11827, Eq. 2): how likely the policy itself would write the pair.

    ``w(y) = exp(mean_t [log p(y_t) - log sum_v p(v)^2])``, and a pair weighs w(y_w) w(y_l); no
    gradient.

    Args:
        policy: [2B, S - 1] log p.
        log_sum_sq_probs: [2B, S - 1], over the vocabulary.
        mask: [2B, S - 1].
    """
    with torch.no_grad():
        total = torch.where(mask > 0, policy - log_sum_sq_probs, 0).sum(1)
        return torch.exp(total / mask.sum(1).clamp(min=1)).view(2, -1).prod(0)


def preference_loss(
    policy: Tokens,
    reference: Tokens,
    mask: Mask,
    settings: LossSettings,
    log_sum_sq_probs: Tokens | None = None,
) -> Float[Tensor, ""]:
    """``sum_i weight_i * mean over pairs of loss_i``.

    Args:
        policy: [2B, S - 1] log p of the policy.
        reference: [2B, S - 1] of the reference.
        mask: [2B, S - 1], 1 where scored.
        settings: Which losses.
        log_sum_sq_probs: [2B, S - 1], see `wpo_weights`; needed with `use_weighting`.

    Raises:
        ValueError: `use_weighting` without `log_sum_sq_probs`.
    """
    pairs = make_pairs(policy, reference, mask, settings)
    weights: Tensor | float = 1.0
    if settings.use_weighting:
        if log_sum_sq_probs is None:
            raise ValueError("use_weighting needs log_sum_sq_probs, log sum_v p(v)^2 per token")
        weights = wpo_weights(policy, log_sum_sq_probs, mask)
    terms = [
        weight * (LOSSES[name](pairs, settings) * weights).mean()
        for name, weight in zip(settings.types, settings.all_weights, strict=True)
    ]
    return torch.stack(terms).sum()


def pair_losses(
    policy: Tokens,
    reference: Tokens,
    mask: Mask,
    settings: LossSettings,
    log_sum_sq_probs: Tokens | None = None,
) -> Float[Tensor, "B"]:
    """`preference_loss` of every pair as if it were alone in the batch."""
    half = len(mask) // 2
    rows = [torch.tensor([i, half + i], device=mask.device) for i in range(half)]
    squares = [None if log_sum_sq_probs is None else log_sum_sq_probs[r] for r in rows]
    losses = [
        preference_loss(policy[r], reference[r], mask[r], settings, square)
        for r, square in zip(rows, squares, strict=True)
    ]
    return torch.stack(losses)


def rewards(
    policy: Tokens, reference: Tokens, mask: Mask, settings: LossSettings
) -> Float[Tensor, "2 B"]:
    """``beta l`` of chosen and rejected answers, the implicit reward; no gradient."""
    return settings.beta * make_pairs(policy, reference, mask, settings).ratios.detach()


def _sorted_gap(first: Tensor, second: Tensor) -> Tensor:
    """Differences of the order statistics."""
    return first.sort().values - second.sort().values


def _smoothed(gap: Tensor, s: LossSettings) -> Tensor:
    """``-(1 - eps) log sigma(beta gap) - eps log sigma(-beta gap)``."""
    z, eps = s.beta * gap, s.label_smoothing
    return -logsigmoid(z) * (1 - eps) - logsigmoid(-z) * eps
