"""ImbalancedAttention: boosts two selected sets of image tokens, each by its own strength.

Paper: "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language
Model", Arif et al., arXiv 2501.12206 (v3 is titled "PAINT: Paying Attention to INformed Tokens").
Sources read: the abstracts of v1 and v3 and the authors' code hasanar1f/llava-hallunication-fix and
hasanar1f/PAINT with its published generations; the paper's body was not available. No code is
copied.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.branches.branch import NoImage, Same
from mmlm.engine.method import Cost, Method, Paper, Prompt, Rows
from mmlm.engine.selections import check_layers, read_numbers
from mmlm.engine.vision.tower import (
    attention_received,
    class_attention,
    feature_block,
    tower_attention_missing,
)
from mmlm.errors import LayoutError

__all__ = [
    "ImbalancedAttention",
    "boost",
    "divergence_gain",
    "image_mass_gain",
    "local_tokens",
    "outlier_share",
    "summary_tokens",
]

_FIRST_LAYER = 2  # of the authors' code, for a model of 32 layers


def local_tokens(score: Float[Tensor, "T p"], ratio: float) -> Bool[Tensor, "T p"]:
    """The ``int(p * ratio)`` tokens of each tile that the early block attends to most."""
    return _rank(score) < int(score.shape[-1] * ratio)


def outlier_share(score: Float[Tensor, "T p"]) -> Float[Tensor, "T"]:
    """Share of tokens above ``Q3 + 1.5 (Q3 - Q1)``, quartiles by linear interpolation. fp64."""
    exact = score.double()
    low, high = exact.quantile(exact.new_tensor([0.25, 0.75]), dim=-1)
    return (exact > (high + 1.5 * (high - low))[:, None]).sum(-1).double() / score.shape[-1]


def summary_tokens(score: Float[Tensor, "T p"]) -> Bool[Tensor, "T p"]:
    """The outliers of the late block: its ``int(p * share)`` highest tokens of each tile.

    ``p * (count / p)`` can fall below ``count`` by rounding; then one outlier is left out, as in
    the authors' code.
    """
    count = (outlier_share(score) * score.shape[-1]).floor()
    return _rank(score) < count[:, None]


def boost(s: Float[Tensor, "B H R K"], strength: Float[Tensor, "B #H K"]) -> Tensor:
    """Delta on scores: ``s' = s + strength |s|``."""
    return s.abs() * strength[:, :, None]


def image_mass_gain(
    s: Float[Tensor, "B H K"], visual: Bool[Tensor, "B K"], real: Bool[Tensor, "B K"]
) -> Float[Tensor, "B H"]:
    """Each head's attention mass on image tokens by the largest of its layer (ours)."""
    a = s.masked_fill(~real[:, None], torch.finfo(s.dtype).min).softmax(-1)
    return _by_largest(a.masked_fill(~visual[:, None], 0).sum(-1))


def divergence_gain(
    with_image: Float[Tensor, "B H d"], without: Float[Tensor, "B H d"]
) -> Float[Tensor, "B H"]:
    """How far each head's output moves without the image, by the largest of its layer (ours)."""
    return _by_largest((with_image - without).norm(dim=-1))


def _by_largest(x: Tensor) -> Tensor:
    return x / x.amax(-1, keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def _rank(score: Tensor) -> Tensor:
    """Place of each token in the order from the highest score to the lowest, from 0."""
    return score.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)


@dataclass
class _Seen:
    """Scores of the patches, as the tower's blocks gave them."""

    late_block: int
    early: Tensor | None = None  # [T, P]
    late: Tensor | None = None


@dataclass
class _State:
    """What is kept for one prompt."""

    strength: Tensor  # [B, N]: alpha on local, beta on summary tokens, 0 elsewhere
    visual: Tensor
    real: Tensor
    gain: dict[int, Tensor] = field(default_factory=dict)

    def columns(self, k: int) -> Tensor:
        """The strength of the positions so far, [B, K]; it is the same in all layers of a step."""
        if self.strength.shape[-1] < k:
            self.strength = functional.pad(self.strength, (0, k - self.strength.shape[-1]))
        return self.strength[:, :k]


@dataclass(frozen=True, kw_only=True)
class ImbalancedAttention(Method):
    """Boosts attention to local-detail and to summary tokens of the image.

    Idea:
        Attention to the image decays with depth. Not all image tokens deserve more of it: those
        that an early block of the vision tower attends to carry local detail, the outliers of a
        late block carry the picture's summary. The two sets get different boosts.
    Paper:
        "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language
        Model" (v3: "PAINT: Paying Attention to INformed Tokens"), arXiv 2501.12206, 2025.
    Equations:
        The paper numbers none that could be read; from the authors' code:
        (a) ``f = sum over heads of the class token's attention`` in an early block, ``g`` the same
        in a late one: :func:`mmlm.engine.vision.tower.class_attention`.
        (b) ``T0 = the int(p r) tokens of largest f``: :func:`local_tokens`.
        (c) ``S = the int(p o) tokens of largest g``, o the share above ``Q3 + 1.5 IQR``:
        :func:`outlier_share`, :func:`summary_tokens`.
        (d) ``s_j + alpha |s_j|`` for j in T0 without S, ``s_j + beta |s_j|`` for j in S:
        :func:`boost`.
    Acts at:
        ``vision_layer`` (looks only): block 0 and the block that makes the image features.
        ``scores`` of the last row, layers 2 and later, prefill and decode.
    Cost:
        No extra forward; with ``head_gain="divergence"`` two extra prefills per prompt. The last
        row of each layer is computed once more in the prefill, and instead of the kernel at
        decode: O(H K d). Two rows of the tower's attention. Memory: B * K numbers.
    Parameters:
        alpha: Strength on local tokens, >= 0. Default 0.5 (ours: the authors' 0.7 falls into loops
            in their own published captions, 0.5 does not). They ran 0.1 to 0.9. Neutral 0.
        beta: Strength on summary tokens, >= 0. Default 0.3 (code). They ran 0.1 to 0.9. Neutral 0.
        local_ratio: Share r of a tile's tokens that are local, in (0, 1]. Default 0.25 (code; 0.1
            to 0.3 were run).
        layers: Decoder layers, 0-based. None: layer 2 and all later ones (code, 32 layers). The
            first layers mix the sequence whatever the depth, so other depths start at 2 as well;
            models of two layers use the last one (ours).
        tower_score: "cls": the class token's attention (default, code). "column_mean": attention
            that patches receive from patches (ours), for towers without a class token.
        head_gain: Each head's share c of alpha and beta, in [0, 1]. "none": c = 1 (default, code).
            "image_mass", "divergence": :func:`image_mass_gain`, :func:`divergence_gain` (ours, for
            the head-specific modulation that the abstract of v1 names and no code contains).
        spatial_ratio: Share of the third, "spatial" set. Must be 0 (code default): its scores are
            row sums of a softmax, which are all 1, so the set would be decided by rounding.
    Shapes:
        B rows, N prompt positions, K positions so far, R new rows, H heads, d head size, T tiles,
        P patches of a tile, p features of a tile after merging.
    State:
        Per prompt: the strength at each position, and the heads' gains if asked for.
    Differs:
        Selection is per tile and per picture; the code knows one picture of one tile. Positions
        come from the model's own packing; row ends are never selected.
        Where the projector merges patches, scores are averaged over them (ours).
        The late block is the one that makes the image features. For LLaVA (feature layer -2) that
        is the second-to-last block, as in the code; for feature layer -1 it is the last.
        Where a model resizes its features, a token counts as selected if half of it is.
        "image_mass" is measured in the running prefill before this layer's boost, with earlier
        layers boosted. Rows without an image are left alone.
        The authors' reported numbers include the guidance of PAI; attach PAI beside this for them.
    Limits:
        Towers with rotary positions or windows (Qwen) are refused; towers without a class token
        (SigLIP) need ``tower_score="column_mean"``. Pictures, no videos. Report length and
        duplicate sentences beside CHAIR: strong settings loop.

    Raises:
        ValueError: for a parameter out of range or a layer that the model does not have.
        UnsupportedModel: if the tower cannot give the score.
        LayoutError: at the first forward, if pictures were encoded elsewhere or do not fit.

    Example:
        with ImbalancedAttention(alpha=0.5, beta=0.3)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title="Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large "
        "Vision-Language Model",
        arxiv="2501.12206",
        year=2025,
        venue="arXiv",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"vision_layer"})
    rewinds: ClassVar[bool] = True

    alpha: float = 0.5
    beta: float = 0.3
    local_ratio: float = 0.25
    layers: tuple[int, ...] | None = None
    tower_score: Literal["cls", "column_mean"] = "cls"
    head_gain: Literal["none", "image_mass", "divergence"] = "none"
    spatial_ratio: float = 0.0

    def __post_init__(self) -> None:
        self._check_number("alpha", at_least=0)
        self._check_number("beta", at_least=0)
        self._check_number("local_ratio", above=0, at_most=1)
        self._check_choice("tower_score", ("cls", "column_mean"))
        self._check_choice("head_gain", ("none", "image_mass", "divergence"))
        self._check_number("spatial_ratio", at_least=0)
        if self.spatial_ratio > 0:
            raise ValueError(
                "ImbalancedAttention: spatial_ratio must be 0: the spatial set's scores are row "
                "sums of a softmax, which are all 1, so rounding would choose it. Leave it out."
            )
        if self.layers is not None:
            object.__setattr__(
                self, "layers", read_numbers("ImbalancedAttention", "layers", self.layers)
            )

    @classmethod
    def paper_setting(cls) -> ImbalancedAttention:
        """The authors' code: alpha 0.7, beta 0.3, r 0.25. Captions fall into loops with it."""
        return cls(alpha=0.7, beta=0.3, local_ratio=0.25)

    def neutral(self) -> ImbalancedAttention:
        """Alpha = beta = 0."""
        return type(self)(alpha=0.0, beta=0.0)

    @property
    def active(self) -> bool:
        """Whether anything is boosted."""
        return self.alpha > 0 or self.beta > 0

    @property
    def rows(self) -> Rows:
        """The last row."""
        return "last"

    @property
    def edits_all_heads(self) -> bool:
        """True: every head's last row is boosted."""
        return True

    @property
    def cost(self) -> Cost:
        """Two prefills for the divergence of the heads, otherwise nothing."""
        return Cost(prompt=2 if self.active and self.head_gain == "divergence" else 0)

    def chosen_layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers that are boosted in a model of ``n_layers`` layers.

        Raises:
            ValueError: If a given layer does not exist.
        """
        if self.layers is None:
            return tuple(range(min(_FIRST_LAYER, n_layers - 1), n_layers))
        check_layers("ImbalancedAttention", self.layers, n_layers)
        return self.layers

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The chosen layers."""
        return self.active and layer in self.chosen_layers(anatomy.n_layers)

    def acts_now(self, state: _State | None, layer: int) -> bool:
        """Prompts with a picture."""
        return state is not None

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Towers that cannot give the score; checks the layers."""
        self.chosen_layers(anatomy.n_layers)
        if not self.active:
            return []
        missing = tower_attention_missing(anatomy)
        if missing:
            return [missing]
        if self.tower_score == "cls" and not anatomy.tower_has_cls:
            return [
                "its vision tower has no class token, whose attention chooses the tokens; "
                "tower_score='column_mean' chooses by the attention that patches receive"
            ]
        return []

    def begin_vision(self, anatomy: Anatomy) -> tuple[Anatomy, _Seen] | None:
        """A place for the tower's scores."""
        return (anatomy, _Seen(late_block=feature_block(anatomy))) if self.active else None

    def vision_layer(
        self, state: tuple[Anatomy, _Seen] | None, block: int, x: Float[Tensor, "T P D"]
    ) -> None:
        """Keeps the patches' scores of the early and the late block."""
        if state is None or block not in (0, state[1].late_block):
            return
        anatomy, seen = state
        measure = class_attention if self.tower_score == "cls" else attention_received
        score = measure(anatomy, block, x).sum(1)
        if block == 0:
            seen.early = score
        if block == seen.late_block:
            seen.late = score

    def begin(self, prompt: Prompt) -> _State | None:
        """Selects the tokens and finds their positions."""
        layout = prompt.layout
        if not self.active or not bool(layout.visual.any()):
            return None
        found = prompt.seen(self)
        if found is None or found[1].early is None or found[1].late is None:
            raise LayoutError(
                "The prompt's pictures were not encoded inside this block, so their tokens "
                "cannot be chosen.",
                advice="Pass pixel_values to generate(), not features encoded before.",
            )
        seen = found[1]
        summary = summary_tokens(prompt.merge_patches(seen.late))
        local = local_tokens(prompt.merge_patches(seen.early), self.local_ratio) & ~summary
        placed = prompt.place(torch.stack([local, summary], dim=-1).float())
        is_local, is_summary = (placed >= 0.5).unbind(-1)
        strength = torch.where(is_local, self.alpha, 0.0)
        strength = torch.where(is_summary, self.beta, strength)
        state = _State(strength=strength, visual=layout.visual, real=layout.real)
        if self.head_gain == "divergence":
            layers = self.chosen_layers(prompt.anatomy.n_layers)
            with_image = prompt.run(Same(), heads=layers).heads
            without = prompt.run(NoImage(), heads=layers).heads
            state.gain = {i: divergence_gain(with_image[i], without[i]) for i in layers}
        return state

    def scores(
        self,
        state: _State | None,
        layer: int,
        rows: Int[Tensor, "B R"],
        s: Float[Tensor, "B H R K"],
    ) -> Float[Tensor, "B H R K"] | None:
        """The boost of the last row."""
        if state is None:
            return None
        strength = state.columns(s.shape[-1])[:, None]
        if self.head_gain == "none":
            return boost(s, strength)
        if layer not in state.gain:  # the prefill: measured before the boost
            state.gain[layer] = image_mass_gain(s[:, :, -1], state.visual, state.real)
        return boost(s, strength * state.gain[layer][:, :, None])
