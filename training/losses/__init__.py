"""Losses of preference training: TRL's names explained and checked, and terms TRL does not have.

The main loss is TRL's own code, chosen by `training.losses.settings.LossSettings`;
`training.losses.dpo` states every one of them as a short formula. What TRL lacks is an `ExtraLoss`,
written like a method: ``MDPO(weight=1.0)``. A trainer gives it the `Passes` of one step and adds
what it returns with `total_loss`.

Nothing here imports torch before a loss is built.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from mmlm.engine.checked import Checked
from mmlm.text_form import parse_part

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["EXTRA_LOSSES", "ExtraLoss", "Passes", "parse_extra_loss", "total_loss"]

EXTRA_LOSSES = {
    "Anchor": "training.losses.anchors:Anchor",
    "AuxiliarySFT": "training.losses.auxiliary:AuxiliarySFT",
    "MDPO": "training.losses.mdpo:MDPO",
    "MaskedImage": "training.losses.masked_image:MaskedImage",
    "POVID": "training.losses.povid:POVID",
    "RLHFV": "training.losses.rlhf_v:RLHFV",
}
"""The extra losses that ship with mmlm."""


class Passes(Protocol):
    """One training step as a loss sees it: B pairs, rows [chosen x B; rejected x B], S positions.

    Column t of a token log-probability is that of token t + 1, so there are S - 1 columns; what
    stands in columns whose mask is 0 has no meaning.
    """

    @property
    def inputs(self) -> Mapping[str, Tensor]:
        """The batch as the model gets it, with `completion_mask` [2B, S]."""

    @property
    def config(self) -> Any:
        """The model's configuration; it says how packed picture patches are laid out."""

    @property
    def beta(self) -> float:
        """Strength of the tie to the reference, > 0."""

    @property
    def step_seed(self) -> int:
        """Seed of this step's random draws: another one per step and rank, the same on resuming."""

    @property
    def mask(self) -> Tensor:
        """[2B, S - 1], 1 where token t + 1 is scored."""

    @property
    def policy(self) -> Tensor:
        """[2B, S - 1] log p of the main pass, with gradient."""

    @property
    def reference(self) -> Tensor:
        """Likewise of the reference, without gradient; raises if only cached sums exist."""

    def ratios(self) -> tuple[Tensor, Tensor]:
        """Log ratio policy / reference summed over each chosen and rejected answer, [B] each."""

    def again(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        """Policy (with gradient) and reference (without) over other rows, [R, S - 1] each.

        One more forward pass of both. Scored are the tokens of `labels` [R, S] if the inputs hold
        them (-100: not scored), else those of `input_ids` where `completion_mask` is 1.
        """

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The policy's logits over other rows, [R, S, V], without gradient."""

    def auxiliary(self) -> tuple[Tensor, Tensor]:
        """The policy over the next rows of the auxiliary data: log p with gradient, and the mask.

        [R, S - 1] each, S of those rows. Which rows depends on the step alone, so that a resumed
        run goes on where it was. Only called by losses with `needs_auxiliary`.
        """


@dataclass(frozen=True, kw_only=True)
class ExtraLoss(Checked, ABC):
    """A term beside TRL's loss, or in its place.

    Parameters:
        weight: Factor on the term, > 0; `total_loss` applies it.
    """

    replaces_main: ClassVar[bool] = False
    """Whether it takes the place of TRL's loss."""
    needs_reference_tokens: ClassVar[bool] = False
    """Whether it reads `Passes.reference`: a cache of summed log-probabilities will not do."""
    needs_auxiliary: ClassVar[bool] = False
    """Whether it reads `Passes.auxiliary`: the run must have auxiliary data."""

    weight: float = 1.0

    def __post_init__(self) -> None:
        self._check_number("weight", above=0)

    @abstractmethod
    def __call__(self, passes: Passes) -> tuple[Tensor, dict[str, float]]:
        """The term.

        Args:
            passes: The step.

        Returns:
            The mean over the B pairs as a scalar, not yet weighted, and numbers for the log.
        """


def parse_extra_loss(text: str) -> ExtraLoss:
    """Turns ``MDPO(weight=1.0)`` into the loss.

    Args:
        text: A Python call with named literals, or a bare name for the defaults. A dotted path
            names a class outside mmlm, `my_package.MyLoss`.

    Raises:
        InputError: The text is no such call, or the name, a parameter or a value is wrong.
    """
    return parse_part(text, EXTRA_LOSSES, "loss")


def total_loss(
    main: Tensor, extra: Sequence[ExtraLoss], passes: Passes
) -> tuple[Tensor, dict[str, float]]:
    """``main + sum_i weight_i * extra_i``, without `main` if an extra loss takes its place.

    Args:
        main: TRL's loss of the step, scalar.
        extra: In any order; `training.losses.settings.check_loss` has checked that they fit.
        passes: The step.

    Returns:
        The loss to train with, and the numbers for the log of all terms, ``loss/NAME`` among them.
    """
    total = main.new_zeros(()) if any(term.replaces_main for term in extra) else main
    log: dict[str, float] = {}
    for term in extra:
        value, numbers = term(passes)
        total = total + term.weight * value
        log |= {f"loss/{type(term).__name__}": value.item(), **numbers}
    return total, log
