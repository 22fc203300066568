"""VISTA: steers the residual stream towards the image and mixes in the logits of late layers.

Paper: "The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via Visual
Information Steering", Li et al., ICML 2025, arXiv 2502.03628.
Sources read: the authors' repository LzVv123456/VISTA for its defaults; no code is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.branches.branch import Branch, NoImage, Same
from mmlm.engine.method import Cost, Method, Paper, Prompt
from mmlm.engine.selections import check_layers, read_numbers

__all__ = ["VISTA", "augment", "steer", "steering_vector"]

# Of the authors' code, for a model of 32 layers: 25 to 30, both included.
_FIRST_OF_32, _DEPTH = 25, 32


def steering_vector(
    with_image: Float[Tensor, "B D"], without: Float[Tensor, "B D"], eps: float
) -> Float[Tensor, "B D"]:
    """V of a layer: what the image adds to its output at the last prompt position.

    Args:
        with_image: The layer's output at the last position of the whole prompt.
        without: The same of the prompt without its image.
        eps: Rounding step of the precision the two were computed in. A difference within it is no
            difference: only the direction of V matters later, and noise has one as well.
    """
    vector = with_image - without
    size = with_image.norm(dim=-1, keepdim=True) + without.norm(dim=-1, keepdim=True)
    return vector.masked_fill(vector.norm(dim=-1, keepdim=True) <= 2 * eps * size, 0)


def steer(
    x: Float[Tensor, "B L D"], vector: Float[Tensor, "B D"], strength: float
) -> Float[Tensor, "B L D"]:
    """The MLP's output turned towards V, with its length kept.

    ``y = lambda (1 + max(0, cos(x, -V))) V / |V|`` and ``x' = |x| unit(x / |x| + y)``: positions
    that point away from V are turned most.
    """
    v = functional.normalize(vector, dim=-1)[:, None]
    unit = functional.normalize(x, dim=-1)
    against = (-(unit * v).sum(-1, keepdim=True)).clamp(min=0)
    turned = functional.normalize(unit + strength * (1 + against) * v, dim=-1)
    return x.norm(dim=-1, keepdim=True) * turned


def augment(
    z: Float[Tensor, "B V"], late: Float[Tensor, "B V"], weight: float
) -> Float[Tensor, "B V"]:
    """Delta on the logits: ``z' = weight late + (1 - weight) z``."""
    return weight * (late - z)


@dataclass
class _State:
    """What is kept for one prompt."""

    head: nn.Module
    late_layers: tuple[int, ...]
    vectors: Mapping[int, Tensor]  # layer -> [B, D]
    late: Tensor | None = None  # [B, D]: sum of the late layers' last positions, of the last pass
    dtype: torch.dtype = torch.float32  # of the model's states


@dataclass(frozen=True, kw_only=True)
class VISTA(Method):
    """Adds back, layer by layer, what the image contributed to the prompt.

    Idea:
        Visual information fades while tokens are generated, and grounded words rise in late but
        not last layers. A vector per layer, the difference that the image made, is added at every
        position; the logits of late layers are mixed into the last ones.
    Paper:
        "The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models via
        Visual Information Steering", arXiv 2502.03628, ICML 2025.
    Equations:
        Numbers were not available; from the authors' code:
        (VSV) ``V_l = h_l(with image) - h_l(without)``: :func:`steering_vector`;
        ``x' = |x| unit(x / |x| + lambda (1 + max(0, cos(x, -V))) V / |V|)``: :func:`steer`.
        (SLA) ``z' = w mean over late l of head(h_l) + (1 - w) z``: :func:`augment`.
    Acts at:
        ``mlp`` of every layer, all positions, prefill and decode (VSV). ``layer_out`` of the late
        layers (looks only) and ``logits``, every step (SLA).
    Cost:
        Two extra prefills per prompt, with and without the image; the tower runs once. One more
        product with the head per token. Memory: B * D numbers per layer.
    Parameters:
        strength: lambda, >= 0. Default 0.17 (authors, LLaVA-1.5 on CHAIR; 0.01 on POPE, 0.1 on
            MMHal: presets). Neutral 0.
        late_weight: w, the share of the late layers' logits, in [0, 1]. Default 0.3 (code).
            Neutral 0.
        late_layers: Late layers, 0-based. None: 25 to 30 for 32 layers (code). Other depths N: the
            same share of layers, ``max(1, round(6 N / 32))``, up to the last but one (ours).
    Shapes:
        B rows, L new positions, D width, V vocabulary.
    State:
        Per prompt: one vector per layer. Per pass: the sum of the late layers' last positions.
    Differs:
        The code takes V through a PCA of one difference, which on one sample returns V plus a unit
        vector at coordinate 0 of layer 0; here V itself is used.
        A V within rounding error counts as zero (see :func:`steering_vector`).
        A difference within rounding counts as none (a sliding window may not reach the image).
        The head is applied to the mean of the late states, not to each: a linear head gives the
        same logits, with one product instead of six.
        The negative prompt removes the image tokens and keeps the chat template, position numbers
        closed up. Rows without an image are left alone.
    Limits:
        The head is applied as it is; a model that caps or scales its logits afterwards does so
        for the last layer only.

    Raises:
        ValueError: for a parameter out of range or a layer that the model does not have.

    Example:
        with VISTA.pope()(model):
            ids = model.generate(**inputs, max_new_tokens=16)
    """

    paper: ClassVar[Paper] = Paper(
        title="The Hidden Life of Tokens: Reducing Hallucination of Large Vision-Language Models "
        "via Visual Information Steering",
        arxiv="2502.03628",
        year=2025,
        venue="ICML 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"layer_out"})

    strength: float = 0.17
    late_weight: float = 0.3
    late_layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        self._check_number("strength", at_least=0)
        self._check_number("late_weight", at_least=0, at_most=1)
        if self.late_layers is not None:
            object.__setattr__(
                self, "late_layers", read_numbers("VISTA", "late_layers", self.late_layers)
            )

    @classmethod
    def chair(cls) -> VISTA:
        """The authors' setting for captions, LLaVA-1.5-7B: lambda 0.17."""
        return cls(strength=0.17)

    @classmethod
    def pope(cls) -> VISTA:
        """The authors' setting for yes/no questions, LLaVA-1.5-7B: lambda 0.01."""
        return cls(strength=0.01)

    @classmethod
    def mmhal(cls) -> VISTA:
        """The authors' setting for MMHal-Bench, LLaVA-1.5-7B: lambda 0.1."""
        return cls(strength=0.1)

    def neutral(self) -> VISTA:
        """No steering and no late logits."""
        return type(self)(strength=0.0, late_weight=0.0)

    @property
    def cost(self) -> Cost:
        """Two prefills, if there is steering."""
        return Cost(prompt=2 if self.strength > 0 else 0)

    def chosen_layers(self, n_layers: int) -> tuple[int, ...]:
        """The late layers of a model of ``n_layers`` layers.

        Raises:
            ValueError: If a given layer does not exist.
        """
        if self.late_layers is None:
            end = max(n_layers - 1, 1)
            count = max(1, round((_DEPTH - 1 - _FIRST_OF_32) * n_layers / _DEPTH))
            return tuple(range(max(end - count, 0), end))
        check_layers("VISTA", self.late_layers, n_layers)
        return self.late_layers

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Every layer if there is steering, otherwise the late ones."""
        late = self.late_weight > 0 and layer in self.chosen_layers(anatomy.n_layers)
        return self.strength > 0 or late

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Nothing; checks the layers."""
        self.chosen_layers(anatomy.n_layers)
        return []

    def begin(self, prompt: Prompt) -> _State | None:
        """Runs the prompt with and without its image and takes the differences."""
        if not bool(prompt.layout.visual.any()):
            return None
        anatomy, vectors = prompt.anatomy, {}
        if self.strength > 0:
            layers = tuple(range(anatomy.n_layers))
            with_image = prompt.run(Same(), layers=layers).layers
            without = prompt.run(NoImage(), layers=layers).layers
            eps = torch.finfo(anatomy.text.dtype).eps
            vectors = {i: steering_vector(with_image[i], without[i], eps) for i in layers}
        late = self.chosen_layers(anatomy.n_layers)
        return _State(head=anatomy.head, late_layers=late, vectors=vectors)

    def mlp(
        self, state: _State | None, layer: int, y: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """The steered output of the MLP."""
        if state is None or self.strength == 0:
            return None
        return steer(y.float(), state.vectors[layer], self.strength).to(y.dtype)

    def layer_out(self, state: _State | None, layer: int, x: Float[Tensor, "B L D"]) -> None:
        """Adds up the last positions of the late layers."""
        if state is None or self.late_weight == 0 or layer not in state.late_layers:
            return
        last = x[:, -1].float()
        if layer != state.late_layers[0] and state.late is not None:
            last = state.late + last
        state.late = last
        state.dtype = x.dtype

    def logits(
        self, state: _State | None, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """The share of the late layers' logits."""
        if state is None or state.late is None:
            return None
        mean = (state.late / len(state.late_layers)).to(state.dtype)
        return augment(z["main"], state.head(mean).float(), self.late_weight)
