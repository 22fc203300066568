"""What the methods that drop patches in the vision tower share: units, positions, line ends."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method, Prompt
from mmlm.engine.vision.patch_look import PatchLook, refuse_unknown_tower
from mmlm.engine.vision.tower import feature_block
from mmlm.methods.patch_scores import top, unit_sums

__all__ = ["Newline", "PatchPruner", "Positions", "columns", "keep_best"]

Positions: TypeAlias = Literal["auto", "compact", "original"]
Newline: TypeAlias = Literal["line", "authors"]


@dataclass(frozen=True, kw_only=True)
class PatchPruner(Method):
    """A method whose ``patches`` site leaves a given number of patches of each tile."""

    @property
    def budget(self) -> int:
        """Patches of a tile that are kept."""
        raise NotImplementedError

    def chosen_unit(self, anatomy: Anatomy) -> int:
        """How many patches leave or stay together."""
        return anatomy.patches_per_feature

    def _check_shared(self, name: str) -> None:
        self._check_integer(name, at_least=1)
        self._check_choice("positions", ("auto", "compact", "original"))

    def renumbers(self, anatomy: Anatomy) -> bool:
        """Compact positions, where the model's can be."""
        positions: Positions = self.positions  # type: ignore[attr-defined]
        return positions == "compact" or (positions == "auto" and anatomy.one_axis)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Positions that cannot be renumbered; checks tower and budget.

        Raises:
            UnknownTower: If it is not known how the tower makes queries, keys and values.
            ValueError: If the budget is no whole number of the model's units.
        """
        refuse_unknown_tower(anatomy)
        unit = self.chosen_unit(anatomy)
        if self.budget % unit:
            raise ValueError(
                f"{self.label}: this model makes one image feature of {unit} patches, so the "
                f"number of patches kept must be a multiple of {unit}, got {self.budget}."
            )
        if self.positions == "compact" and not anatomy.one_axis:  # type: ignore[attr-defined]
            return [
                "its positions have several axes, or windows that count them, so they cannot be "
                "renumbered without gaps; positions='original' (or 'auto') keeps them"
            ]
        return []

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """In no decoder layer."""
        return False

    def acts_in_tower(self, anatomy: Anatomy, block: int) -> bool:
        """After the block that makes the image features."""
        return block == feature_block(anatomy)

    def begin(self, prompt: Prompt) -> Callable[[], list[list[list[int]]]]:
        """Notes which patches are left."""
        return prompt.patches_kept()

    def record(self, state: Any, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """The patches of each row that were kept, tile by tile."""
        return [{"kept": row} for row in state()]


def keep_best(
    look: PatchLook, scores: Float[Tensor, "T P"], unit: int, budget: Int[Tensor, " T"] | int
) -> Int[Tensor, "T P"]:
    """Columns of the units with the largest sums of scores.

    Args:
        look: What stands in the block.
        scores: Of each patch.
        unit: Patches of a unit.
        budget: Units of each tile that stay, at most.
    """
    units = look.units(unit)
    count = -(-max(look.sizes) // unit)
    held = unit_sums(look.valid.to(scores.dtype), units, count) > 0
    sums = unit_sums(scores, units, count).masked_fill(~held, -torch.inf)
    if isinstance(budget, int):
        budget = torch.full((len(sums),), budget, device=sums.device)
    kept = top(sums, budget) & held
    return columns(kept.gather(1, units.clamp(min=0)) & look.valid)


def columns(keep: Bool[Tensor, "T P"]) -> Int[Tensor, "T P"]:
    """Numbers of the columns where ``keep`` is True, -1 elsewhere."""
    index = torch.arange(keep.shape[1], device=keep.device)
    return torch.where(keep, index, -1)
