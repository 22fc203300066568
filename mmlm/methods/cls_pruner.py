"""ClsPruner: image features by the class token's attention, FasterVLM.

Papers: "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818
(the method); "When Language Overrules", arXiv 2508.10552 (which compresses by it). Sources read:
the authors' code of the former (Theia-4869/FasterVLM, f5d5f12). Nothing is copied from it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Paper
from mmlm.engine.vision.patch_look import PatchLook
from mmlm.methods.patch_pruner import Newline, PatchPruner, Positions, keep_best
from mmlm.methods.patch_scores import attention_row

__all__ = ["ClsPruner"]


@dataclass(frozen=True, kw_only=True)
class ClsPruner(PatchPruner):
    """Keeps the patches that the tower's class token attends to most.

    Idea:
        A class token's attention shows which patches carry the picture. One cut after the tower
        leaves the best of them; the decoder's prompt becomes shorter. The baseline that methods
        which prune within the tower have to beat.
    Paper:
        "[CLS] Attention is All You Need for Training-Free Visual Token Pruning", arXiv 2412.01818,
        2024. Text dominance (arXiv 2508.10552) measures with it.
    Equations:
        ``a_j = mean over heads of softmax(q_cls . k / sqrt(d))_j`` in the block that makes the
        features, class column left out: :func:`attention_row`. The ``keep`` largest stay, in order.
    Acts at:
        ``patches`` after the block that makes the image features.
    Cost:
        None of its own: queries and keys are the block's. No block of the tower becomes cheaper,
        but blocks behind the features are not run, and the projector sees the survivors only.
    Parameters:
        keep: Patches kept of each tile, >= 1; at least as many as there are changes nothing.
            Default 144, a quarter of 576 (authors; 58 and 29 are their 90 and 95 %). Counts
            patches, also where a model makes one feature of several.
        positions: "compact": positions behind what left become smaller, without gaps (the
            authors' code); "original": what stays keeps its numbers. Default "auto" (ours):
            compact where positions have one axis and no window counts them, else original.
        newline: Line ends of pictures of several tiles. "line": they stay while anything in their
            line does (default, ours); "authors": all stay.
    Shapes:
        T tiles, S tokens and P patches of a tile.
    State:
        Per prompt: numbers of the patches that are left.
    Differs:
        Towers without a class token use the mean query's row, in Qwen towers with windows after
        their last block that sees all (it makes the features). Whole merge units are kept, by the
        sum of their patches' scores. Scores are fp32, in the authors' code the model's precision.
    Limits:
        Pictures, no videos. Not beside methods that act on all patches in the tower, or that need
        all image positions.

    Raises:
        ValueError: for a parameter out of range, or a number that is no multiple of the unit.
        UnknownTower: if the tower's queries and keys cannot be read.

    Example:
        with ClsPruner(keep=144)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title="[CLS] Attention is All You Need for Training-Free Visual Token Pruning: Make VLM "
        "Inference Faster",
        arxiv="2412.01818",
        year=2024,
        venue="arXiv",
    )
    rewinds: ClassVar[bool] = True
    measures: ClassVar[str] = "cls_pruner"

    keep: int = 144
    positions: Positions = "auto"
    newline: Newline = "line"

    def __post_init__(self) -> None:
        self._check_shared("keep")
        self._check_choice("newline", ("line", "authors"))

    def neutral(self) -> ClsPruner:
        """More than any tile has."""
        return type(self)(keep=2**20)

    @property
    def budget(self) -> int:
        """``keep``."""
        return self.keep

    @property
    def line_ends(self) -> Literal["line", "all", "none"]:
        """The authors keep every one."""
        return "all" if self.newline == "authors" else "line"

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Towers whose last block sees windows only, beyond what all of these methods need."""
        windows = anatomy.tower_windows
        last = len(anatomy.tower_blocks) - 1
        if windows and last not in windows:
            return [f"the last block ({last}) of its vision tower sees windows only"]
        return super().unsupported(anatomy)

    def patches(
        self, state: Any, block: int, x: Float[Tensor, "T S D"], look: PatchLook
    ) -> Int[Tensor, "tiles P"] | None:
        """The best patches of each tile."""
        if look.numbers.shape[1] <= self.keep:
            return None
        scores = attention_row(look)
        look.refuse_non_finite(scores)
        return keep_best(look, scores, look.unit, self.keep // look.unit)
