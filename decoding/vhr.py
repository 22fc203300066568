"""VHR: vision-aware head reinforcement.

Paper: "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
He et al., ACL 2025, arXiv 2412.13949.
Sources read: paper v3 with appendices A-G. The authors' code was not available, so nothing here is
taken from it; where the paper leaves a choice, the docstring says what was chosen and why.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.branches.branch import Branch, NoImage
from mmlm.engine.divergence import divergence, drop_negative_outliers, text_activation
from mmlm.engine.method import Cost, Method, Paper, Prompt
from mmlm.engine.selections import HeadSet, check_heads, check_layers, read_heads, read_numbers

__all__ = [
    "VHR",
    "divergence",
    "drop_negative_outliers",
    "select_heads",
    "text_activation",
    "total",
]


def select_heads(vhd: Float[Tensor, "B H"]) -> Bool[Tensor, "B H"]:
    """The image-sensitive half: heads above the lower median of their layer (Eq. 7)."""
    return vhd > vhd.median(dim=-1, keepdim=True).values


def total(vhd: Float[Tensor, "L B H"], k: int) -> Float[Tensor, "B"]:
    """T-VHD (Eq. 5): the sum over layers of the ``k`` largest head divergences.

    An analysis figure: a lower value at a step goes with hallucinated words. The paper does not
    state its ``k``.
    """
    return vhd.topk(k, dim=-1).values.sum(dim=(0, -1))


@dataclass(frozen=True)
class _State:
    """What is kept for one prompt."""

    without: Mapping[int, Tensor]
    has_image: Tensor
    heads: dict[int, Tensor] = field(default_factory=dict)
    gain: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class VHR(Method):
    """Amplifies the attention heads that react to the image.

    Idea:
        Only some heads change their output when the image is removed. Multiplying the output of
        the more image-sensitive half by ``alpha`` turns each block towards what was seen, because
        a normalisation follows (Proposition 1).
    Paper:
        "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        arXiv 2412.13949, ACL 2025.
    Equations:
        (4) ``VHD = || A(image, text) - A(text) ||_2``: :func:`divergence`.
        (5) ``T-VHD = sum over layers of the k largest VHD``: :func:`total`.
        (6) ``VHD = 0`` where VHD and text activation both exceed mean + deviation:
        :func:`drop_negative_outliers`.
        (7) heads with ``VHD > median``: :func:`select_heads`.
        Algorithm 1: layers in order, each layer measured with the earlier ones reinforced.
    Acts at:
        ``heads`` of the chosen layers; heads are chosen at the last prompt position during the
        prefill and scaled at all positions, prefill and decode.
    Cost:
        One extra prefill of the text without its image per prompt, up to the last chosen layer;
        no extra forward per token. Memory: B * H * d numbers per chosen layer.
    Parameters:
        alpha: Gain of the chosen heads, > 0. Default 2.0 (paper). Neutral 1.0.
        layers: Decoder layers, 0-based. None: layer 1 and the last ``round(0.4375 * N_l)``
            layers, which is the paper's choice (1, 18..31) for 32 layers; for other depths the
            rule is ours.
        include_layer_1: Whether None includes layer 1. Default True (paper). The paper warns that
            layer 1 helps CHAIR but not every benchmark.
        outliers: Whether Eq. 6 is applied. Default True (paper).
        unbiased: Deviation of Eq. 6 with divisor H - 1. Default True (ours; not stated).
        text_branch: "plain": the text-only pass is not reinforced (default, ours; the paper counts
            one additional pass). "lockstep": the same heads are scaled in both passes.
        heads_by_layer: Fixed heads as ((layer, (head, ...)), ...), as ((layer, head), ...), or the
            path of a map of heads (``mmlm calibrate heads --kind visual``), instead of choosing
            them; then ``layers`` must be None. No extra prefill.
    Shapes:
        B rows, L new positions, H query heads, d head size, V vocabulary, N_l layers.
    State:
        Per prompt: text-only head outputs, chosen heads and gains of the chosen layers.
    Differs:
        VHD is the plain norm, as in Eq. 4; ports square it, which changes Eq. 6.
        The lower median is used (H even, no ties: exactly half of the heads).
        A divergence below rounding error counts as zero (see :func:`divergence`).
        Rows without an image are left alone.
    Limits:
        Needs ``self_attn.o_proj``-like projections. "lockstep" needs a dynamic cache and costs a
        second full-length set of rows in the prefill. Chunked prefill is refused.

    Raises:
        ValueError: for a parameter out of range or a layer that the model does not have.
        UnsupportedModel: if the model has no output projection per layer.

    Example:
        with VHR(alpha=2.0)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title="Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence",
        arxiv="2412.13949",
        year=2025,
        venue="ACL 2025",
    )
    rewinds: ClassVar[bool] = True

    alpha: float = 2.0
    layers: tuple[int, ...] | None = None
    include_layer_1: bool = True
    outliers: bool = True
    unbiased: bool = True
    text_branch: Literal["plain", "lockstep"] = "plain"
    heads_by_layer: HeadSet | None = None

    def __post_init__(self) -> None:
        self._check_number("alpha", above=0)
        self._check_choice("text_branch", ("plain", "lockstep"))
        for name in ("include_layer_1", "outliers", "unbiased"):
            self._check_choice(name, (True, False))
        if self.layers is not None:
            chosen = read_numbers("VHR", "layers", self.layers)
            object.__setattr__(self, "layers", chosen)
        if self.heads_by_layer is not None:
            if self.layers is not None:
                raise ValueError("VHR: give layers or heads_by_layer, not both.")
            object.__setattr__(
                self, "heads_by_layer", read_heads("VHR", "heads_by_layer", self.heads_by_layer)
            )

    @classmethod
    def for_model(cls, anatomy: Anatomy, *, alpha: float = 2.0) -> VHR:
        """The paper's setting for a model, with the layers spelled out.

        The paper's table: LLaVA-1.5-7B and LLaVA-NeXT-7B (32 layers) use layers 1 and 18..31,
        InstructBLIP-7B uses 14..31, all with alpha 2. Other models get our rule.
        """
        if anatomy.family_name == "instructblip" and anatomy.n_layers == 32:
            return cls(alpha=alpha, layers=tuple(range(14, 32)))
        return cls(alpha=alpha, layers=cls(alpha=alpha).chosen_layers(anatomy.n_layers))

    def neutral(self) -> VHR:
        """Alpha = 1."""
        return type(self)(alpha=1.0)

    @property
    def riders(self) -> tuple[Branch, ...]:
        """The text-only rows of the lockstep mode."""
        lockstep = self.text_branch == "lockstep" and self.heads_by_layer is None
        return (NoImage(),) if lockstep and self.alpha != 1 else ()

    @property
    def cost(self) -> Cost:
        """One text-only row, unless the heads are given or nothing is amplified."""
        return Cost(prompt=int(self.alpha != 1 and self.heads_by_layer is None))

    def chosen_layers(self, n_layers: int) -> tuple[int, ...]:
        """The layers that are reinforced in a model of ``n_layers`` layers.

        Raises:
            ValueError: If a given layer does not exist.
        """
        if self.heads_by_layer is not None:
            chosen = tuple(layer for layer, _ in self.heads_by_layer)
        elif self.layers is not None:
            chosen = self.layers
        else:
            last = range(n_layers - round(0.4375 * n_layers), n_layers)
            first = {1} if self.include_layer_1 and n_layers > 1 else set()
            chosen = tuple(sorted({*last, *first}))
        check_layers("VHR", chosen, n_layers)
        return chosen

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The chosen layers."""
        return layer in self.chosen_layers(anatomy.n_layers)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Nothing beyond the output projection; checks the layers."""
        check_heads("VHR", self.heads_by_layer or (), anatomy)
        self.chosen_layers(anatomy.n_layers)
        return []

    def begin(self, prompt: Prompt) -> _State | None:
        """Runs the text-only prefill and keeps its head outputs."""
        if self.alpha == 1:
            return None
        chosen = self.chosen_layers(prompt.anatomy.n_layers)
        has_image = prompt.layout.has_image()
        if self.heads_by_layer is not None:
            state = _State(without={}, has_image=has_image)
            shape = (prompt.rows, prompt.anatomy.n_heads)
            for layer, heads in self.heads_by_layer:
                state.heads[layer] = torch.zeros(shape, dtype=torch.bool, device=has_image.device)
                state.heads[layer][:, list(heads)] = True
            return state
        if self.riders or not bool(has_image.any()):
            return _State(without=dict.fromkeys(chosen, has_image), has_image=has_image)
        return _State(prompt.run(NoImage(), heads=chosen).heads, has_image)

    def heads(
        self, state: _State | None, layer: int, y: Float[Tensor, "B L H d"]
    ) -> Float[Tensor, "B 1 H 1"] | None:
        """Chooses heads at the first call for a layer; returns their gain at every call."""
        if state is None:
            return None
        gain = state.gain.get(layer)
        if gain is not None:
            return gain
        if layer in state.heads:
            chosen = state.heads[layer] & state.has_image[:, None]
        elif layer in state.without and bool(state.has_image.any()):
            chosen = self.choose(state, layer, y)
        else:
            return None
        state.heads[layer] = chosen
        gain = torch.where(chosen, self.alpha, 1.0).to(y.dtype)[:, None, :, None]
        state.gain[layer] = gain
        both = y.shape[0] == 2 * gain.shape[0]
        return torch.cat([gain, gain]) if both else gain

    def choose(self, state: _State, layer: int, y: Float[Tensor, "B L H d"]) -> Bool[Tensor, "B H"]:
        """The heads of one layer, from its output at the last prompt position."""
        last = y[:, -1].float()
        rows = state.has_image.shape[0]
        with_image = last[:rows]
        without = last[rows:] if last.shape[0] > rows else state.without[layer]
        vhd = divergence(with_image, without, y.dtype)
        if self.outliers:
            vhd = drop_negative_outliers(vhd, text_activation(without), unbiased=self.unbiased)
        return select_heads(vhd) & state.has_image[:, None]
