"""Which of TRL's losses are trained with, in which mixture; checked before any work is done."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from training.losses import ExtraLoss

__all__ = ["DIVERGENCES", "LOSS_TYPES", "LossSettings", "check_loss"]

LOSS_TYPES = (
    "sigmoid",
    "hinge",
    "ipo",
    "exo_pair",
    "nca_pair",
    "robust",
    "bco_pair",
    "sppo_hard",
    "aot",
    "aot_unpaired",
    "apo_zero",
    "apo_down",
    "discopop",
    "sft",
    "sigmoid_norm",
)
"""TRL's names; `training.losses.dpo` has the formula of each."""
DIVERGENCES = ("reverse_kl", "forward_kl", "js_divergence", "alpha_divergence")
"""Divergences that keep the policy near the reference (f-DPO, arXiv 2309.16240)."""
# Losses that see policy and reference only in the difference of scores.
_ANY_DIVERGENCE = {
    "sigmoid",
    "sigmoid_norm",
    "hinge",
    "ipo",
    "exo_pair",
    "robust",
    "discopop",
    "sft",
}
# TRL multiplies the loss of each pair in place, which fails on the one value that sft has for all.
_NOT_BY_PAIR = {
    "aot": "sorts the pairs of a batch",
    "aot_unpaired": "sorts the pairs of a batch",
    "sft": "has one value for a whole batch",
}


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """The main loss: ``sum_i weights[i] * types[i]``. Names and defaults are TRL's.

    Attributes:
        types: Names of `LOSS_TYPES`. C-DPO and plain DPO: ("sigmoid",). With a token-mean NLL of
            the chosen answers (RPO, MIA-DPO): ("sigmoid", "sft"). MPO (arXiv 2411.10442):
            ("sigmoid", "bco_pair", "sft") with weights (0.8, 0.2, 1.0).
        weights: One finite number per type; None for 1.0 each.
        beta: Strength of the tie to the reference, > 0; tau of IPO. Default 0.1 (DPO's authors).
        label_smoothing: Share of pairs believed to be the wrong way round, in [0, 0.5). Read by
            robust, exo_pair, aot and aot_unpaired; sigmoid ignores it.
        ld_alpha: Factor on the tokens of an answer beyond the length of the shorter one of its
            pair, in [0, 1] (LD-DPO, arXiv 2409.06411); None to count them like the others.
        use_weighting: Weigh pairs by how likely the policy would write them (WPO, arXiv
            2406.11827). Not with aot and aot_unpaired, which sort pairs, nor with sft.
        f_divergence_type: One of `DIVERGENCES`. Other than reverse_kl only with losses of the
            difference of scores.
        f_alpha_divergence_coef: Order of the alpha divergence, finite.
        discopop_tau: Temperature of discopop, > 0. Default 0.05 (its authors).

    Raises:
        ValueError: See `check_loss`.
    """

    types: tuple[str, ...] = ("sigmoid",)
    weights: tuple[float, ...] | None = None
    beta: float = 0.1
    label_smoothing: float = 0.0
    ld_alpha: float | None = None
    use_weighting: bool = False
    f_divergence_type: str = "reverse_kl"
    f_alpha_divergence_coef: float = 0.5
    discopop_tau: float = 0.05

    def __post_init__(self) -> None:
        check_loss(
            self.types,
            self.weights,
            self.beta,
            label_smoothing=self.label_smoothing,
            ld_alpha=self.ld_alpha,
            use_weighting=self.use_weighting,
            f_divergence_type=self.f_divergence_type,
        )
        if not (math.isfinite(self.discopop_tau) and self.discopop_tau > 0):
            raise ValueError(
                f"discopop_tau must be a finite number > 0, got {self.discopop_tau!r}."
            )
        if not math.isfinite(self.f_alpha_divergence_coef):
            raise ValueError(
                f"f_alpha_divergence_coef must be finite, got {self.f_alpha_divergence_coef!r}."
            )

    @property
    def all_weights(self) -> tuple[float, ...]:
        """One weight per type."""
        return (1.0,) * len(self.types) if self.weights is None else self.weights

    def for_trl(self) -> dict[str, Any]:
        """The arguments of TRL's `DPOConfig` that say the same."""
        return {
            "loss_type": list(self.types),
            "loss_weights": None if self.weights is None else list(self.weights),
            "beta": self.beta,
            "label_smoothing": self.label_smoothing,
            "ld_alpha": self.ld_alpha,
            "use_weighting": self.use_weighting,
            "f_divergence_type": self.f_divergence_type,
            "f_alpha_divergence_coef": self.f_alpha_divergence_coef,
            "discopop_tau": self.discopop_tau,
        }


def check_loss(
    types: Sequence[str],
    weights: Sequence[float] | None,
    beta: float,
    *,
    label_smoothing: float = 0.0,
    ld_alpha: float | None = None,
    use_weighting: bool = False,
    f_divergence_type: str = "reverse_kl",
    extra: Sequence[ExtraLoss] = (),
) -> None:
    """Refuses a loss that cannot be trained with; the parameters are those of `LossSettings`.

    Args:
        types: Names.
        weights: One per name, or None.
        beta: Strength.
        label_smoothing: See there.
        ld_alpha: See there.
        use_weighting: See there.
        f_divergence_type: See there.
        extra: The extra losses of the run.

    Raises:
        ValueError: An unknown or repeated name, none at all, another number of weights than of
            names, a value out of its range, or parts that cannot go together. The message says
            what is allowed.
    """
    _check_names(types, f_divergence_type)
    if weights is not None and len(weights) != len(types):
        raise ValueError(
            f"{len(weights)} loss weights {list(weights)} for {len(types)} loss types "
            f"{list(types)}: give one weight per type, or none for 1.0 each."
        )
    for weight in weights or ():
        if not math.isfinite(weight):
            raise ValueError(f"A loss weight must be a finite number, got {weight!r}.")
    if not (math.isfinite(beta) and beta > 0):
        raise ValueError(f"beta must be a finite number > 0, got {beta!r}; DPO's authors use 0.1.")
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing must be in [0, 0.5), got {label_smoothing!r}.")
    if "exo_pair" in types and label_smoothing == 0:
        raise ValueError(
            "exo_pair takes the logarithm of label_smoothing and cannot be used with 0; "
            "its authors use 0.001."
        )
    if ld_alpha is not None and not 0 <= ld_alpha <= 1:
        raise ValueError(f"ld_alpha must be in [0, 1] or absent, got {ld_alpha!r}.")
    whole = [name for name in types if name in _NOT_BY_PAIR]
    if use_weighting and whole:
        raise ValueError(
            f"use_weighting weighs single pairs and cannot be combined with {whole[0]}, "
            f"which {_NOT_BY_PAIR[whole[0]]}."
        )
    _check_extra(extra, ld_alpha)


def _check_names(types: Sequence[str], divergence: str) -> None:
    unknown = [name for name in types if name not in LOSS_TYPES]
    if unknown or not types:
        given = f"loss type {unknown[0]!r} is unknown" if unknown else "no loss type is given"
        raise ValueError(f"{given}; there are: {', '.join(LOSS_TYPES)}.")
    if len(set(types)) != len(types):
        raise ValueError(
            f"a loss type is named twice in {list(types)}: give it one weight instead."
        )
    if divergence not in DIVERGENCES:
        raise ValueError(
            f"f_divergence_type {divergence!r} is unknown; there are: {', '.join(DIVERGENCES)}."
        )
    fixed = [name for name in types if name not in _ANY_DIVERGENCE]
    if divergence != "reverse_kl" and fixed:
        raise ValueError(
            f"loss type {fixed[0]} is defined with reverse_kl only, not with {divergence}; "
            f"{', '.join(sorted(_ANY_DIVERGENCE))} work with any divergence."
        )


def _check_extra(extra: Sequence[ExtraLoss], ld_alpha: float | None) -> None:
    if extra and ld_alpha is not None:
        # Their ratios are plain sums; one answer counted in two ways would not cancel.
        raise ValueError(
            f"ld_alpha cannot be combined with {type(extra[0]).__name__}, "
            "which counts every token of an answer; leave one of them out."
        )
    replacing = [type(term).__name__ for term in extra if term.replaces_main]
    if len(replacing) > 1:
        raise ValueError(f"{' and '.join(replacing)} both replace the main loss: use one.")
    names = [type(term).__name__ for term in extra]
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"the extra loss {name} is given twice: give it one weight instead.")
