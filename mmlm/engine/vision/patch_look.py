"""What a method may see of a tower's block: queries, keys and values that the block itself made.

They are what the block's own projections returned, caught by hooks: nothing is projected a second
time, and no attention matrix is asked for. Whatever kernel the tower uses, they are the same.
"""

from __future__ import annotations

import functools
import inspect
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmlm.engine.vision.tower import ATTENTION_NAMES, ROTARY_NAMES, first_of
from mmlm.errors import UnknownTower, UnsupportedModel

if TYPE_CHECKING:
    from collections.abc import Callable

    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.vision.patch_rows import PackedRows, TileRows

__all__ = ["PatchLook", "block_attention", "catch_projections", "refuse_unknown_tower"]


class PatchLook:
    """What stands in a tower's block, a row per tile.

    Everything is worked out when it is asked for; who asks for nothing costs nothing.

    Attributes:
        numbers: int64 [T, P]; number of the patch in each column, -1 where a row has none. Patches
            keep their numbers when others leave.
        sizes: Patches of each tile before any left.
        unit: How many patches one image feature is made of.
        first: 1 if a class token stands in front of the patches, else 0.
    """

    def __init__(
        self,
        rows: TileRows | PackedRows,
        caught: dict[str, Any],
        anatomy: Anatomy,
        refuse_non_finite: Callable[[Tensor], None],
    ) -> None:
        self._rows, self._caught, self._anatomy = rows, caught, anatomy
        #: Raises FloatingPointError with the picture whose values [T, ...] are not finite.
        self.refuse_non_finite = refuse_non_finite
        self.numbers: Int[Tensor, "T P"] = rows.numbers
        self.sizes = rows.sizes
        self.unit: int = anatomy.patches_per_feature
        self.first = rows.first

    @property
    def valid(self) -> Bool[Tensor, "T P"]:
        """Where a column holds a patch."""
        return self.numbers >= 0

    def units(self, unit: int) -> Int[Tensor, "T P"]:
        """The block of ``unit`` patches that each patch is part of, -1 where a row has none."""
        if self._rows.packed:  # patches of a unit stand side by side
            return torch.where(self.valid, self.numbers.clamp(min=0) // unit, -1)
        return self._anatomy.feature_of_patch(self.numbers, max(self.sizes), unit)

    @functools.cached_property
    def query(self) -> Float[Tensor, "T H d"]:
        """The class token's query, or else the mean query of all patches; fp32, unscaled."""
        if self.first:
            return self._states("q", slice(0, 1))[:, :, 0]
        q, seen = self._states("q"), self._seen[:, None, :, None]
        return q.masked_fill(~seen, 0).sum(2) / seen.sum(2)

    @functools.cached_property
    def scores(self) -> Float[Tensor, "T H S"]:
        """Scaled scores of that query with all tokens, -inf where a row has none."""
        s = torch.einsum("thd,thsd->ths", self.query, self._states("k")) * self.scale
        return s.masked_fill(~self._seen[:, None], -torch.inf)

    @functools.cached_property
    def values(self) -> Float[Tensor, "T H S d"]:
        """Values of all tokens, the class token in front; fp32, 0 where a row has none."""
        return self._states("v").masked_fill(~self._seen[:, None, :, None], 0)

    @property
    def seen(self) -> Bool[Tensor, "T S"]:
        """Where a token is real, the class token included."""
        return self._seen

    @property
    def scale(self) -> float:
        """Factor of the scores."""
        return float(self._caught["head"] ** -0.5)

    @functools.cached_property
    def _seen(self) -> Bool[Tensor, "T S"]:
        return self._rows.seen()

    def _states(self, name: str, part: slice = slice(None)) -> Float[Tensor, "T H S d"]:
        caught = self._caught
        if "qkv" in caught:
            states = caught["qkv"].select(-3, "qkv".index(name))
            if name != "v":
                cosine, sine = (angle.float()[:, None] for angle in caught["rotary"])
                states = _rotated(states.float(), cosine, sine)
        elif name in caught:
            states = caught[name]
        else:
            raise UnsupportedModel(
                f"The tower's block returned no {name} states.",
                advice="Use a model whose tower has query, key and value projections.",
            )
        return self._rows.tokens(states)[:, part].float().transpose(1, 2)


def block_attention(block: Any) -> Any:
    """The attention module of a tower's block."""
    return first_of(block, ATTENTION_NAMES)


def refuse_unknown_tower(anatomy: Anatomy) -> None:
    """Raises if it is not known how this tower makes queries, keys and values.

    Raises:
        UnknownTower: Names the class.
    """
    block = anatomy.tower_blocks[0]
    attention = block_attention(block)
    rotary = bool(ROTARY_NAMES & set(inspect.signature(block.forward).parameters))
    separate = all(hasattr(attention, name) for name in ("q_proj", "k_proj", "v_proj"))
    packed = (
        hasattr(attention, "qkv") and "cu_seqlens" in inspect.signature(block.forward).parameters
    )
    if (separate and not rotary) or (packed and rotary):
        return
    raise UnknownTower(
        f"{type(anatomy.tower).__name__}: the attention of its blocks "
        f"({type(attention).__name__}) has neither q_proj, k_proj and v_proj with plain positions "
        "nor a fused qkv with rotary positions and packed pictures, so its patches cannot be "
        "chosen.",
        advice="Use a model with a CLIP, SigLIP, InternViT or Qwen tower.",
    )


def catch_projections(
    attention: Any, place: Callable[[], dict[str, Any] | None], stack: ExitStack
) -> None:
    """Hooks that note what an attention module's projections return, heads split: [..., H, d].

    Args:
        attention: The attention module of a block.
        place: Returns where to note it, or None if nobody asks; an entry ``rotary`` holds cosines
            and sines of the positions.
        stack: Takes the hooks off.
    """
    heads = attention.num_heads

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            caught = place()
            if caught is not None:
                caught[name] = output.detach().unflatten(-1, (heads, -1))
                caught["head"] = caught[name].shape[-1]

        return hook

    def fused(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        caught = place()
        if caught is not None:
            caught["qkv"] = output.detach().unflatten(-1, (3, heads, -1))
            caught["head"] = caught["qkv"].shape[-1]

    if hasattr(attention, "qkv"):
        stack.callback(attention.qkv.register_forward_hook(fused).remove)
        return
    for name in ("q", "k"):
        # Where these norms exist they run over all heads together, before the heads are split.
        last = getattr(attention, f"{name}_norm", None) or getattr(attention, f"{name}_proj")
        stack.callback(last.register_forward_hook(note(name)).remove)
    stack.callback(attention.v_proj.register_forward_hook(note("v")).remove)


def _rotated(
    x: Float[Tensor, "S H d"], cosine: Float[Tensor, "S 1 d"], sine: Float[Tensor, "S 1 d"]
) -> Float[Tensor, "S H d"]:
    """Rotary positions, half of the numbers of a head against the other half."""
    left, right = x.chunk(2, dim=-1)
    return x * cosine + torch.cat([-right, left], dim=-1) * sine
