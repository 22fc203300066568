"""CrossLMM: few pooled visual tokens in the decoder, and cross-attention to the unpooled ones.

Paper: "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual Cross-Attention Mechanisms",
arXiv 2505.17020, 2025.
Sources read: the paper. Its authors have published no code; where the paper leaves a choice or
contradicts itself, the docstring says what was chosen.
"""

from __future__ import annotations

import ast
import functools
import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.layout import VISUAL
from mmlm.engine.method import Method, Paper, Prompt
from mmlm.errors import LayoutError
from mmlm.methods.cross_blocks import FRAMES, CrossAttention, CrossBlocks, Shape, Store
from mmlm.methods.cross_state import State, lay_out, looked, seen_by_text, seen_by_visual

__all__ = ["CrossLMM", "pool_grid"]

#: What the weights depend on: a file made with other values is refused.
_OF_WEIGHTS = ("every", "kv_source", "v2v", "t2v", "temporal_pos")


def pool_grid(
    x: Float[Tensor, "T h w D"], cells: int, mode: str = "average"
) -> Float[Tensor, "T s s D"]:
    """Grids of states pooled to ``cells`` x ``cells``, without parameters (section 3.1).

    Args:
        x: The grids.
        cells: Side s of the pooled grid.
        mode: "average": means over equal windows, which overlap by a column where s does not divide
            the side. "bilinear": the values at the centres of s x s equal squares.
    """
    grid = x.permute(0, 3, 1, 2)
    if mode == "average":
        pooled = functional.adaptive_avg_pool2d(grid, cells)
    else:
        pooled = functional.interpolate(
            grid, size=(cells, cells), mode="bilinear", align_corners=False
        )
    return pooled.permute(0, 2, 3, 1)


@dataclass(frozen=True, kw_only=True)
class CrossLMM(Method):
    """Pools the visual tokens, and lets the decoder look back at the unpooled ones.

    Idea:
        Only ``grid`` x ``grid`` pooled tokens per picture or frame enter the decoder. In every
        ``every``-th layer two gated cross-attentions bring detail back from the unpooled states:
        from the pooled tokens (V2V) and from the text (T2V). Those states never enter the sequence,
        so cost is linear in their number. It must be trained; with gates at 0 the model is the
        one on pooled tokens.
    Paper:
        "CrossLMM: Decoupling Long Video Sequences from LMMs via Dual Cross-Attention Mechanisms",
        arXiv 2505.17020, 2025.
    Equations:
        (1)-(3) pooling before the projector: :func:`pool_grid`.
        (4)-(10) ``I'[visual] += tanh(g_v) Attn(W_q I'[visual], W_k Z, W_v Z)`` and the same for the
        text, both from the same I', after the self-attention and before the MLP:
        :class:`mmlm.methods.cross_blocks.CrossAttention`.
    Acts at:
        ``pool``; ``attended`` of layers 0, K, 2K, ...
    Cost:
        No extra decoder row. Per acting layer and kind: keys and values of O originals,
        ``4 O E G d`` FLOP, two projections of the queries, and attention linear in O. Each later
        token reads the stored keys and values.
    Parameters:
        weights_file: File of trained weights; "": fresh ones, with gates as below.
        grid: Side s of the pooled grid. Default 4 (paper: 1, 3 or 4). 0: nothing is pooled.
        every: K: layers 0, K, 2K, ... have blocks. Default 4 (paper's best).
        pooling: "average" (default, ours: the paper's text contradicts itself) or "bilinear".
        kv_source: Where keys and values come from: "tower", what enters the projector (default,
            ours, as figure 2 draws it; cheaper), or "projected", all of it behind the projector.
        v2v: Whether pooled tokens look. Default True (paper).
        t2v: Whether text looks. Default True (paper).
        v2v_scope: What pooled tokens see: "video" (default, ours): their own picture, or all
            frames of their own video; "own": of a video their own frame only; "all": every picture
            up to their own.
        t2v_cache: What later tokens read: "full" (default), "fp8" (8 bits), or "pooled:n": means
            over n x n cells of each frame.
        temporal_pos: Whether a learned vector of the frame's number is added before the keys'
            projection. Default False (paper describes none).
        newline: "drop" (default, ours) or "keep": line ends of pictures cut into tiles.
        gate: First value of fresh gates, before their tanh. Default 0 (ours; not stated).
        source_grid: (height, width) of a tile's states, where they form no square.
    Shapes:
        B rows, L new positions, D' width of the decoder, s x s pooled states of a tile, R rows
        before beams, O originals of the row that has most, E their width, G key/value heads.
    State:
        Per prompt: the originals until the first pass is over; their keys and values for T2V.
    Differs:
        Gates are scalars of each block, not shared, tanh in fp32. Queries are normalised by a
        fresh RMSNorm that begins as the layer's own before its MLP, image states by one of ones
        (the paper's eq. 4 is post-norm, its model pre-norm). No feed-forward of its own, though
        figure 2 draws one: the published number of parameters has no room for it. Attention has the
        decoder's own shape, biases included. A row sees the originals of pictures whose
        placeholders begin before it; one that sees none is left as it is. Positions are numbered
        afresh where they have one axis; elsewhere a pooled token has the position of its cell's
        centre. Where the projector merges patches, pooling keeps whole merges; in Qwen's families
        features are pooled behind it, deep-stacked ones too. In pictures cut into tiles a cell
        whose centre is padding stands at what is left of it, or leaves with it.
    Limits:
        Layers must add attention and MLP to the residual one after the other. In a later turn on a
        kept cache new pictures are not looked at. Recomputed activations need torch's newer way
        (``use_reentrant=False``) where tower or projector learn. Auxiliary prompts see the pooled
        tokens only.

    Raises:
        ValueError: for a parameter out of range, more cells than states, more layers than there
            are, a picture whose states were not seen, or weights made with other settings.
        UnsupportedModel: if the layers' sums cannot be reached.

    Example:
        with CrossLMM(weights_file="crosslmm.safetensors")(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title="CrossLMM: Decoupling Long Video Sequences from LMMs via Dual Cross-Attention "
        "Mechanisms",
        arxiv="2505.17020",
        year=2025,
        venue="arXiv",
    )
    rewinds: ClassVar[bool] = True
    fresh_is_valid: ClassVar[bool] = True

    weights_file: str = ""
    grid: int = 4
    every: int = 4
    pooling: Literal["average", "bilinear"] = "average"
    kv_source: Literal["tower", "projected"] = "tower"
    v2v: bool = True
    t2v: bool = True
    v2v_scope: Literal["own", "video", "all"] = "video"
    t2v_cache: str = "full"
    temporal_pos: bool = False
    newline: Literal["drop", "keep"] = "drop"
    gate: float = 0.0
    source_grid: tuple[int, int] | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        self._check_integer("grid", at_least=0)
        self._check_integer("every", at_least=1)
        self._check_number("gate", at_least=-20, at_most=20)
        self._check_choice("pooling", ("average", "bilinear"))
        self._check_choice("kv_source", ("tower", "projected"))
        self._check_choice("v2v_scope", ("own", "video", "all"))
        self._check_choice("newline", ("drop", "keep"))
        for name in ("v2v", "t2v", "temporal_pos"):
            self._check_choice(name, (True, False))
        kind, _, side = self.t2v_cache.partition(":")
        if not (self.t2v_cache in ("full", "fp8") or (kind == "pooled" and _positive(side))):
            raise ValueError(
                "CrossLMM: t2v_cache must be 'full', 'fp8' or 'pooled:n' with n >= 1, got "
                f"{self.t2v_cache!r}."
            )
        if self.source_grid is not None:
            pair = tuple(self.source_grid)
            if len(pair) != 2 or not all(isinstance(n, int) and n >= 1 for n in pair):
                raise ValueError(
                    "CrossLMM: source_grid must be (height, width), both >= 1, or None, got "
                    f"{self.source_grid!r}."
                )
            object.__setattr__(self, "source_grid", pair)

    def neutral(self) -> CrossLMM:
        """Nothing pooled, and gates at 0."""
        return type(self)(grid=0, gate=0.0)

    @property
    def originals(self) -> Literal["", "tower", "projected"]:
        """The states that keys and values are made of."""
        return self.kv_source if self.v2v or self.t2v else ""

    @property
    def line_ends(self) -> Literal["line", "all", "none"]:
        """Line ends go with the grid that they ended, if asked to."""
        return "line" if self.newline == "keep" else "none"

    def renumbers(self, anatomy: Anatomy) -> bool:
        """Pooled tokens are one sequence, not one with gaps."""
        return self.grid > 0 and anatomy.one_axis

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Layers 0, K, 2K, ..."""
        return layer % self.every == 0 and (self.v2v or self.t2v)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Nothing beyond the parts; checks numbers that the model bounds."""
        if self.every > anatomy.n_layers:
            raise ValueError(
                f"CrossLMM: every = {self.every}, but the model has {anatomy.n_layers} layers."
            )
        side = _feature_side(anatomy)
        if side is not None and self.source_grid is None and self.grid > side:
            raise ValueError(
                f"CrossLMM: grid = {self.grid}, but a picture has {side} x {side} features: "
                f"at most {side}."
            )
        return []

    # ---- weights -------------------------------------------------------------------------------

    def modules(self, anatomy: Anatomy) -> CrossBlocks | None:
        """Fresh blocks for the acting layers."""
        if not (self.v2v or self.t2v):
            return None
        config = anatomy.config.get_text_config()
        shape = Shape.of(anatomy)
        source = anatomy.tower_width if self.kv_source == "tower" else anatomy.width
        layers = [x for x in range(anatomy.n_layers) if self.acts_in(anatomy, x)]

        def block(layer: int) -> CrossAttention:
            made = CrossAttention(
                shape,
                source,
                eps=getattr(config, "rms_norm_eps", 1e-6),
                gate=self.gate,
                frames=FRAMES if self.temporal_pos else 0,
            )
            _copy_norm(anatomy.mlp_norm(layer), made.q_norm)
            return made

        shapes_only = anatomy.head.weight.is_meta
        with torch.device("meta") if shapes_only else nullcontext():
            return CrossBlocks(
                {layer: block(layer) for layer in layers} if self.v2v else {},
                {layer: block(layer) for layer in layers} if self.t2v else {},
            )

    def check_weights(self, made_by: str) -> None:
        """Refuses weights that were made with settings on which they depend.

        Raises:
            ValueError: Names both.
        """
        try:
            call = ast.parse(made_by, mode="eval").body
            given = {k.arg: ast.literal_eval(k.value) for k in call.keywords}  # type: ignore[attr-defined]
        except (SyntaxError, ValueError, AttributeError):
            return  # not our text: names and shapes of the tensors are compared next
        for name in _OF_WEIGHTS:
            if name in given and given[name] != getattr(self, name):
                raise ValueError(
                    f"CrossLMM: the weights were made with {name} = {given[name]!r}, but "
                    f"{name} = {getattr(self, name)!r} is asked for."
                )

    # ---- pooling -------------------------------------------------------------------------------

    def pool(
        self, state: None, x: Float[Tensor, "T h w D"], side: int
    ) -> Float[Tensor, "T a b D"] | None:
        """The grids pooled to ``grid`` x ``grid`` features.

        Raises:
            LayoutError: If there are fewer states than cells.
        """
        height, width = x.shape[1:3]
        cells = self.grid * side
        if self.grid == 0 or (height, width) == (cells, cells):
            return None
        if cells > height or cells > width:
            raise LayoutError(
                f"CrossLMM: grid = {self.grid}, but a picture has {height // side} x "
                f"{width // side} features.",
                advice="Choose a smaller grid.",
            )
        return pool_grid(x, cells, self.pooling)

    # ---- cross-attention -----------------------------------------------------------------------

    def begin(self, prompt: Prompt) -> State | None:
        """Lays the originals of each row side by side.

        Raises:
            LayoutError: If there are placeholders, but their pictures were not encoded here.
        """
        if not (self.v2v or self.t2v) or not bool(prompt.layout.has_image().any()):
            return None
        found = prompt.originals(self)
        if found is None:
            raise LayoutError(
                "CrossLMM: the prompt has image placeholders, but its pictures were not encoded "
                "inside this block, so there is nothing to look back at.",
                advice="Pass the processor's pixel inputs.",
            )
        blocks = prompt.module(self)
        assert isinstance(blocks, CrossBlocks)
        return lay_out(prompt, blocks, found, self.t2v_cache, numbered=self.temporal_pos)

    def attended(
        self, state: State | None, layer: int, x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """What both cross-attentions of a layer add; None where nobody looks."""
        if state is None:
            return None
        if state.prompt.past:
            return self._later(state, layer, x)
        layout, kept = state.prompt.layout, state.prompt.kept
        there, place = kept >= 0, kept.clamp(min=0)
        visual = there & (layout.seg.gather(1, place) == VISUAL)
        text = there & ~visual
        delta = None
        if self.v2v:
            block = state.blocks.v2v[str(layer)]
            seen = functools.partial(seen_by_visual, scope=self.v2v_scope)
            delta = looked(block, state, x, visual, place, seen)
        if self.t2v:
            block = state.blocks.t2v[str(layer)]
            new = looked(block, state, x, text, place, seen_by_text, self._keep(layer))
            delta = new if delta is None else delta if new is None else delta + new
        if layer == max(map(int, state.blocks.t2v or state.blocks.v2v)):
            self._let_go(state)
        return delta

    def _keep(self, layer: int) -> Callable[[State, Tensor, Tensor], None]:
        """Stores keys and values of a layer, unless no token can follow."""

        def keep(state: State, k: Tensor, v: Tensor) -> None:
            if not state.blocks.training:
                kind = self.t2v_cache.partition(":")[0]
                state.stores[layer] = Store(kind, k, v, state.keys, state.groups)

        return keep

    def _let_go(self, state: State) -> None:
        """The originals are not needed once every layer has its store."""
        if state.blocks.training:  # activations may be computed again
            return
        if not self.t2v or len(state.stores) == len(state.blocks.t2v):
            state.z = None

    def _later(self, state: State, layer: int, x: Tensor) -> Tensor | None:
        """Generated text, and words of a later turn."""
        if not self.t2v:
            return None
        block: CrossAttention = state.blocks.t2v[str(layer)]  # type: ignore[assignment]
        store = state.stores.get(layer)
        if store is None:  # a model in training mode that generates
            assert state.z is not None
            k, v = block.keys_values(state.z, state.number)
            store = Store("full", k, v, state.keys)
        if x.shape[0] % store.keys.shape[0]:
            raise LayoutError(
                f"CrossLMM: {x.shape[0]} rows go on from {store.keys.shape[0]} prompts.",
                advice="Rows may only be repeated, as beam search does.",
            )
        k, v = store.get()
        whole = state.whole if state.groups is None else store.whole
        return block(x, k, v, None if whole else store.keys)


def _copy_norm(norm: nn.Module, into: nn.Module) -> None:
    """The factors of a norm, whatever its family calls them: what it makes of ones."""
    weight: Tensor | None = getattr(norm, "weight", None)
    into_weight: Tensor = into.weight  # type: ignore[assignment]
    if weight is None or weight.is_meta:
        return
    if hasattr(weight, "ds_id"):  # ZeRO-3 has shared it out
        import deepspeed

        with deepspeed.zero.GatheredParameters([weight]), torch.no_grad():
            factors = norm.forward(torch.ones_like(weight))
    else:
        with torch.no_grad():
            factors = norm.forward(torch.ones_like(weight))
    with torch.no_grad():
        into_weight.copy_(factors.float())


def _feature_side(anatomy: Anatomy) -> int | None:
    """Features along a side of a picture or tile, None where pictures have any size."""
    vision = anatomy.config.vision_config
    size, patch = getattr(vision, "image_size", None), getattr(vision, "patch_size", None)
    if size is None or patch is None:
        return None
    across = [int(s) // int(p) for s, p in zip(_pair(size), _pair(patch), strict=True)]
    side = math.isqrt(anatomy.patches_per_feature)
    return min(across) // side


def _pair(x: object) -> tuple[int, int]:
    return tuple(x) if isinstance(x, list | tuple) else (x, x)  # type: ignore[return-value]


def _positive(text: str) -> bool:
    return text.isdigit() and int(text) >= 1
