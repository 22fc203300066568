"""DARA: learned factors on the attention that each image of a prompt gets.

Paper: "True Multimodal In-Context Learning Needs Attention to the Visual Context",
Chen et al., COLM 2025, arXiv 2507.15807.
Sources read: abstract and first paragraphs, the authors' project page with its figures and table,
rebuttal figures and the README of the code release. Neither the code nor the rest of the paper
could be read; what that leaves open is chosen by us and marked so.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import check_layers, read_numbers
from mmlm.methods.dara_factors import Factors, said
from mmlm.methods.dara_slots import explicit_slots, given_slots, image_slots, place_images

__all__ = ["DARA", "Factors", "explicit_slots", "image_slots", "place_images"]


@dataclass(frozen=True)
class _State:
    """What is kept for one prompt.

    Attributes:
        module: The factors.
        slots: int64 [B, N]; -1 where there is no image.
        acting: By layer: [B, H, N], kept while nothing learns.
    """

    module: Factors
    slots: Tensor
    acting: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class DARA(Method):
    """Multiplies attention on each image of a prompt by a learned factor per head.

    Idea:
        With demonstrations (picture, question, answer) in the prompt, models copy the pattern of
        the text and look past the pictures. One factor per head and picture in the first layer,
        about 150 numbers in all, is trained so that the pictures of the demonstrations count.
    Paper:
        "True Multimodal In-Context Learning Needs Attention to the Visual Context",
        arXiv 2507.15807, COLM 2025.
    Equations:
        None is numbered in the sources read. With ``g_hj = F[l, h, slot(j)]`` for a feature j of
        an image and 1 for every other key:
        "score": ``A = softmax_j(g_hj q_i k_j / sqrt(d) + mask_ij)``.
        "weight": ``A_ij = g_hj a_ij / sum_m g_hm a_im`` with ``a`` the plain weights, which is
        ``log g_hj`` added to the scores.
        slot: :func:`image_slots`; F: :class:`Factors`.
    Acts at:
        ``keys`` ("score") or ``scores`` ("weight") of the chosen layers, for every query: text,
        images, new tokens. The cache keeps raw keys.
    Cost:
        No extra forward. "score": the model's own kernel once per layer, with keys and values
        repeated to H heads in the chosen layers (B H K d numbers while it runs). "weight": the
        attention of the chosen layers is computed twice, in chunks. Training sends gradients to
        the first layer, so it needs the memory of a full back-propagation, however few numbers
        learn.
    Parameters:
        weights_file: A file that :func:`mmlm.engine.weights.store` wrote. "": fresh factors.
        layers: Decoder layers with factors, 0-based. Default (0,): the first (paper). (): none,
            the neutral setting.
        images: Slots S, >= 1: the demonstrations' pictures and, last, the query's. Default 5 (the
            paper's setting: 4 demonstrations and a query).
        mode: "score" (default; the sources speak of the score matrix, which is our reading) or
            "weight", after the softmax.
        align: What fewer images than S are: an "error" (default, ours), or "query_last": the last
            is the query's, the others are demonstrations from the first on. One image alone is
            the query's.
        overflow: What more images than S are: an "error" (default, ours), or "last_demo": further
            demonstrations share the factor of slot S - 2.
        init: The value of fresh factors, > 0. Default 1 (inferred: what was learned lies around
            it), at which the model is unchanged.
    Shapes:
        B rows, H query heads, N positions, K keys, S images.
    State:
        Per prompt: the slot of each position, and while nothing learns the factors by position.
    Differs:
        The form before the softmax is our reading of the sources; so are initial value, what is
        no image feature (frames, row ends count to their image, wrappers are text), and the whole
        training recipe. Where raw scores on an image are negative, a factor above 1 lowers its
        attention in mode "score": measure attention before calling factors amplification.
    Limits:
        Mode "weight" is refused beside flash kernels, paged and sparse kernels are refused in
        both. Pictures of a later turn on a kept cache have factor 1. A query or a demonstration
        with several pictures needs :func:`explicit_slots`. Frames of a video are one image.

    Raises:
        ValueError: for a parameter out of range, a layer that the model does not have, factors
            that are not finite (or not positive), a file of other factors, a number of images
            that has no slots, or an attention kernel that cannot do it.

    Example:
        with DARA(weights_file="factors.safetensors")(model):
            ids = model.generate(**inputs, max_new_tokens=16)
    """

    paper: ClassVar[Paper] = Paper(
        title=("True Multimodal In-Context Learning Needs Attention to the Visual Context"),
        arxiv="2507.15807",
        year=2025,
        venue="COLM 2025",
    )
    rewinds: ClassVar[bool] = True
    fresh_is_valid: ClassVar[bool] = True

    weights_file: str = ""
    layers: tuple[int, ...] = (0,)
    images: int = 5
    mode: Literal["score", "weight"] = "score"
    align: Literal["error", "query_last"] = "error"
    overflow: Literal["error", "last_demo"] = "error"
    init: float = 1.0

    def __post_init__(self) -> None:
        if not isinstance(self.weights_file, str):
            raise ValueError(f"DARA: weights_file must be a path, got {self.weights_file!r}.")
        layers = () if self.layers == () else read_numbers("DARA", "layers", self.layers)
        object.__setattr__(self, "layers", layers)
        self._check_integer("images", at_least=1)
        self._check_choice("mode", ("score", "weight"))
        self._check_choice("align", ("error", "query_last"))
        self._check_choice("overflow", ("error", "last_demo"))
        self._check_number("init", above=0)
        if self.overflow == "last_demo" and self.images < 2:
            raise ValueError(
                "DARA: overflow='last_demo' needs images >= 2, a demonstration's slot."
            )

    def neutral(self) -> DARA:
        """No layer."""
        return type(self)(layers=())

    @property
    def sites(self) -> frozenset[str]:
        """The one site of the mode."""
        return frozenset({"keys" if self.mode == "score" else "scores"})

    @property
    def rows(self) -> Rows:
        """All rows: a factor belongs to a key."""
        return "all"

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The chosen layers."""
        return layer in self.layers

    def acts_now(self, state: _State | None, layer: int) -> bool:
        """Wherever the prompt has an image and a factor is not 1, or may learn."""
        return state is not None

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Checks the layers and the attention kernel."""
        check_layers("DARA", self.layers, anatomy.n_layers)
        kernel = anatomy.text.config._attn_implementation or "eager"
        if "paged" in kernel or "sparse" in kernel:
            raise ValueError(
                f"DARA: attention {kernel!r} keeps its own keys, which cannot be scaled; use sdpa, "
                "eager, flex_attention or a flash kernel."
            )
        if self.mode == "weight" and "flash" in kernel:
            raise ValueError(
                f"DARA: mode 'weight' adds to scores, which attention {kernel!r} does not show; "
                "use mode='score', or sdpa or eager."
            )
        return []

    def read_from(
        self, shapes: Mapping[str, tuple[int, ...]], module: nn.Module
    ) -> Collection[str]:
        """All tensors; refuses factors that were trained for something else."""
        wanted = {name: tuple(x.shape) for name, x in module.state_dict().items()}
        if dict(shapes) != wanted:
            raise ValueError(
                f"DARA: {self.weights_file!r} holds {said(shapes)}; {self.label} needs "
                f"{said(wanted)} on this model."
            )
        return shapes.keys()

    def modules(self, anatomy: Anatomy) -> Factors | None:
        """The factors: ``len(layers) * H * S`` numbers."""
        if not self.layers:
            return None
        return Factors(self.layers, anatomy.n_heads, self.images, self.mode, self.init)

    def begin(self, prompt: Prompt) -> _State | None:
        """Finds the slot of each position.

        Raises:
            ValueError: See :func:`image_slots`, :func:`explicit_slots`, :meth:`Factors.refuse`.
        """
        layout = prompt.full_layout
        if not self.layers or not bool(layout.visual.any()):
            return None
        slots = given_slots(prompt.anatomy.model, layout, self.images)
        if slots is None:
            slots = image_slots(layout, self.images, self.align, self.overflow)
        module = prompt.module(self)
        assert isinstance(module, Factors)
        factors = module.factors()
        module.refuse(factors.detach())
        if not factors.requires_grad and bool((factors == 1).all()):
            return None
        return _State(module, prompt.entered(slots))

    def _acting(self, state: _State, layer: int) -> Float[Tensor, "B H N"]:
        """What acts on the keys of a layer; from the module each time while it may learn."""
        known = state.acting.get(layer)
        if known is not None:
            return known
        of_slots = state.module()[self.layers.index(layer)]  # [H, S]
        neutral = 1 if self.mode == "score" else 0
        # Slot -1 is the last column: what is no image.
        acting = functional.pad(of_slots, (0, 1), value=neutral)[:, state.slots].transpose(0, 1)
        if not acting.requires_grad:
            state.acting[layer] = acting
        return acting

    def keys(self, state: _State, layer: int) -> Float[Tensor, "B H N"]:
        """The factor of each key of the prompt."""
        return self._acting(state, layer)

    def scores(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], s: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H 1 K"]:
        """The logarithm of the factor of each key; new tokens have none."""
        acting = self._acting(state, layer)[:, :, None]
        return functional.pad(acting, (0, s.shape[-1] - acting.shape[-1]))
