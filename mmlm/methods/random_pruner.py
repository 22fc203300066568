"""RandomPruner: image features drawn at random, the floor for methods that choose them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlm.engine.method import Paper
from mmlm.engine.vision.patch_look import PatchLook
from mmlm.methods.patch_pruner import PatchPruner, Positions, keep_best

__all__ = ["RandomPruner"]


@dataclass(frozen=True, kw_only=True)
class RandomPruner(PatchPruner):
    """Keeps patches drawn at random; what a method that chooses them must beat.

    Idea:
        Neighbouring patches say much the same, so even a random choice loses little at moderate
        budgets. A method is worth its name by what it gains over this one.
    Paper:
        None of its own. It is the control that papers on pruning compare with, here with
        "FlowCut: Rethinking Redundancy via Information Flow", arXiv 2505.19536.
    Equations:
        A permutation of the units of a tile from ``seed`` and their number; the first ones stay.
    Acts at:
        ``patches`` after the block that makes the image features.
    Cost:
        None. As with ClsPruner no block of the tower becomes cheaper.
    Parameters:
        keep: Patches kept of each tile, >= 1; at least as many as there are changes nothing.
            Default 144, as ClsPruner's. Counts patches, also where a feature is made of several.
        seed: Of the permutation, 0 to 2**32. Default 0 (ours).
        positions: As in ClsPruner. Default "auto" (ours).
    Shapes:
        T tiles, S tokens and P patches of a tile.
    State:
        Per prompt: numbers of the patches that are left.
    Differs:
        Tiles of the same size lose the same places, so that what is kept of a picture does not
        depend on what is answered beside it. Use several seeds.
    Limits:
        Pictures, no videos. Not beside methods that act on all patches in the tower, or that need
        all image positions.

    Raises:
        ValueError: for a parameter out of range, or a number that is no multiple of the unit.
        UnknownTower: if the tower is of a kind that is not known.

    Example:
        with RandomPruner(keep=144, seed=1)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title="FlowCut: Rethinking Redundancy via Information Flow for Efficient Vision-Language "
        "Models",
        arxiv="2505.19536",
        year=2025,
        venue="NeurIPS 2025",
    )
    rewinds: ClassVar[bool] = True
    measures: ClassVar[str] = "random_pruner"

    keep: int = 144
    seed: int = 0
    positions: Positions = "auto"

    def __post_init__(self) -> None:
        self._check_shared("keep")
        self._check_integer("seed", at_least=0, at_most=2**32)

    def neutral(self) -> RandomPruner:
        """More than any tile has."""
        return type(self)(keep=2**20)

    @property
    def budget(self) -> int:
        """``keep``."""
        return self.keep

    def patches(
        self, state: Any, block: int, x: Float[Tensor, "T S D"], look: PatchLook
    ) -> Int[Tensor, "tiles P"] | None:
        """The first patches of each tile's permutation."""
        if look.numbers.shape[1] <= self.keep:
            return None
        rank = torch.zeros(len(look.sizes), max(look.sizes) + 1)
        for tile, size in enumerate(look.sizes):
            units = size // look.unit
            order = torch.randperm(units, generator=torch.Generator().manual_seed(self.seed))
            # The same for all patches of a unit: the rank from the end, so that the first win.
            of_unit = torch.empty(units)
            of_unit[order] = torch.arange(units, 0, -1, dtype=torch.float32)
            rank[tile, :units] = of_unit
        units = look.units(look.unit)
        scores = rank.to(x.device).gather(1, units.clamp(min=0))
        return keep_best(look, scores, look.unit, self.keep // look.unit)
