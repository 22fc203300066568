"""ONLY: one layer's intervention.

Paper: "ONLY: One-Layer Intervention Sufficiently Mitigates Hallucinations in Large Vision-Language
Models", Wan et al., ICCV 2025, arXiv 2507.00898.
Sources read: the paper and the authors' repository zifuwan/ONLY for its constants and for the order
of its steps; no code is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.branches.branch import Branch
from mmlm.engine.method import Cost, Method, Paper, Prompt, Rows

__all__ = [
    "ONLY",
    "contrast_or_collaborate",
    "distance",
    "drop_outliers",
    "entropy",
    "entropy_ratio",
    "textual_heads",
]


def drop_outliers(
    a: Float[Tensor, "B H K"], columns: Bool[Tensor, "B K"]
) -> Float[Tensor, "B H K"]:
    """Zeroes the weights above mean + deviation of some columns; nothing is renormalised.

    Args:
        a: Attention weights of one query.
        columns: The columns of one modality. The deviation over them is unbiased.
    """
    wanted = columns[:, None]
    n = wanted.sum(-1, keepdim=True)
    mean = (a * wanted).sum(-1, keepdim=True) / n.clamp(min=1)
    square = ((a - mean).square() * wanted).sum(-1, keepdim=True) / (n - 1).clamp(min=1)
    return a.masked_fill(wanted & (a > mean + square.sqrt()), 0)


def entropy(
    a: Float[Tensor, "B H K"], columns: Bool[Tensor, "B K"], *, if_empty: float
) -> Float[Tensor, "B H"]:
    """Entropy in nats of the weights within some columns, renormalised over them.

    Args:
        a: Weights.
        columns: The columns of one modality.
        if_empty: Value where no weight is left in them.
    """
    part = a * columns[:, None]
    mass = part.sum(-1, keepdim=True)
    p = part / torch.where(mass > 0, mass, 1)
    value = -(p * (p + 1e-6).log()).sum(-1)  # the authors' floor within the logarithm
    return torch.where(mass[..., 0] > 0, value.clamp(min=0), if_empty)


def entropy_ratio(
    a: Float[Tensor, "B H K"], text: Bool[Tensor, "B K"], visual: Bool[Tensor, "B K"]
) -> Float[Tensor, "B H"]:
    """TVER of each head: entropy over text columns by entropy over image columns."""
    seen = entropy(a, visual, if_empty=torch.inf)
    return entropy(a, text, if_empty=0.0) / seen.clamp(min=1e-6)


def textual_heads(ratio: Float[Tensor, "B H"]) -> Bool[Tensor, "B H"]:
    """Heads whose ratio is not below the mean of their layer."""
    return ratio >= ratio.mean(-1, keepdim=True)


def distance(
    z: Float[Tensor, "B V"], textual: Float[Tensor, "B V"], *, whole_batch: bool = False
) -> Float[Tensor, "B 1"]:
    """``d = sum |p - p~|`` of each row, in [0, 2] (twice the total variation distance).

    Args:
        z: Logits of the model.
        textual: Logits of the textual pass.
        whole_batch: The sum over all rows, for every row, as in the authors' code.
    """
    d = (z.softmax(-1) - textual.softmax(-1)).abs().sum(-1, keepdim=True)
    return d.sum(0, keepdim=True).expand_as(d) if whole_batch else d


def contrast_or_collaborate(
    z: Float[Tensor, "B V"],
    textual: Float[Tensor, "B V"],
    d: Float[Tensor, "B 1"],
    *,
    gamma: float,
    collaborate: float,
    contrast: float,
) -> Float[Tensor, "B V"]:
    """Delta on the main logits: towards the textual ones where both agree, else away from them.

    Args:
        z: Logits of the model.
        textual: Logits of the textual pass.
        d: Their distance.
        gamma: Distance below which they agree.
        collaborate: ``z' = z + collaborate * z~`` where they agree.
        contrast: ``z' = (1 + contrast) z - contrast * z~`` where they do not.
    """
    return torch.where(d < gamma, collaborate * textual, contrast * (z - textual))


@dataclass(frozen=True)
class _State:
    """What is kept for one prompt; the tensors in ``now`` belong to the running step."""

    prompt: Prompt
    text: Tensor
    visual: Tensor
    now: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ONLY(Method):
    """Compares the model with a textual version of itself that costs one layer.

    Idea:
        One attention layer is computed a second time for the newest token, with its strongest
        weights off and only those heads on that look more at text than at the image. Carried past
        the other layers it tells what language alone would say: trusted where it agrees with the
        model, subtracted where it does not.
    Paper:
        "ONLY: One-Layer Intervention Sufficiently Mitigates Hallucinations in Large
        Vision-Language Models", arXiv 2507.00898, ICCV 2025.
    Equations:
        In the order of the paper's Section 3, by name:
        weights above mean + deviation are set to 0: :func:`drop_outliers`;
        ``TVER = H_text / H_image``: :func:`entropy_ratio`;
        heads with TVER below the mean are set to 0: :func:`textual_heads`;
        ``d = sum |p - p~|``: :func:`distance`;
        ``z' = z + 3 z~`` if ``d < gamma``, else ``2 z - z~``: :func:`contrast_or_collaborate`;
        tokens with ``p < beta * max p`` are cut: :func:`mmlm.engine.combine.edit_logits`.
    Acts at:
        ``weights`` of layer ``layer``, last row, and ``layer_in`` of the last layer (both only
        look), ``logits``; every step, prefill and decode.
    Cost:
        No extra row. For the last position of each pass: one attention row, one MLP and one head
        projection more. Memory: B * H * K weights of one row.
    Parameters:
        gamma: Distance below which the textual pass is trusted, in [0, 2]. Default 0.2 (authors'
            POPE script; 0.25 for CHAIR, 0.1 in their sampler).
        beta: Plausibility cut, in [0, 1]. Default 0.1 (authors' sampler; 0.4 for MME with
            InstructBLIP). Neutral 0.
        collaborate: Weight of the textual logits where both agree, >= 0. Default 3.0 (authors'
            sampler). Neutral 0.
        contrast: Strength of the contrast elsewhere, >= 0. Default 1.0 (authors' sampler).
            Neutral 0.
        layer: The layer that is computed twice, from 0 to below the last. Default 0 (authors).
        residual_share: Share of the last layer's input added to the carried output, >= 0. Default
            0.2 (authors' code).
        distance_over_batch: One distance for all rows, their sum, as in the authors' code.
            Default False: each row its own.
    Shapes:
        B rows, L new positions, H query heads, K columns, D width, V vocabulary.
    State:
        Text and image columns of the prompt; of the running step the textual output and the last
        layer's input at the last position, B * D numbers each.
    Differs:
        Positions 35 and 576 and layer 31 are written into the authors' code; here they come from
        the prompt's layout and the model.
        Their code sums the distance over the batch and, in a batch, takes numbers of rows for
        numbers of heads. Here every row stands for itself; ``distance_over_batch=True`` restores
        the sum.
        Excluded from the text columns is each row's first text position, which is the beginning
        of the sequence in their prompts. In a family with a norm on either side of its MLP the
        carried output passes both.
    Limits:
        Needs ``input_layernorm``-like norms and an MLP per layer. Rows without an image are left
        alone.

    Raises:
        ValueError: for a parameter out of range or a layer that is not below the last.
        UnsupportedModel: if the model's last layer has no such parts.

    Example:
        with ONLY.chair()(model):
            ids = model.generate(**inputs, do_sample=True)
    """

    paper: ClassVar[Paper] = Paper(
        title="ONLY: One-Layer Intervention Sufficiently Mitigates Hallucinations in Large "
        "Vision-Language Models",
        arxiv="2507.00898",
        year=2025,
        venue="ICCV 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"layer_in", "weights"})

    gamma: float = 0.2
    beta: float = 0.1
    collaborate: float = 3.0
    contrast: float = 1.0
    layer: int = 0
    residual_share: float = 0.2
    distance_over_batch: bool = False

    def __post_init__(self) -> None:
        self._check_number("gamma", at_least=0, at_most=2)
        self._check_number("beta", at_least=0, at_most=1)
        for name in ("collaborate", "contrast", "residual_share"):
            self._check_number(name, at_least=0)
        self._check_integer("layer", at_least=0)
        self._check_choice("distance_over_batch", (True, False))

    @classmethod
    def pope(cls) -> ONLY:
        """The authors' POPE script: gamma 0.2."""
        return cls(gamma=0.2)

    @classmethod
    def chair(cls) -> ONLY:
        """The authors' CHAIR script: gamma 0.25."""
        return cls(gamma=0.25)

    @classmethod
    def mme_instructblip(cls) -> ONLY:
        """The authors' MME script for InstructBLIP: a cut of 0.4."""
        return cls(beta=0.4)

    def neutral(self) -> ONLY:
        """Neither collaboration nor contrast, and no cut."""
        return type(self)(collaborate=0.0, contrast=0.0, beta=0.0)

    @property
    def mixes_rows(self) -> bool:
        """With one distance for all rows."""
        return self.distance_over_batch

    @property
    def _off(self) -> bool:
        return self.collaborate == 0 and self.contrast == 0

    @property
    def plausibility(self) -> float:
        """The cut beta."""
        return self.beta

    @property
    def rows(self) -> Rows:
        """The last row only."""
        return "last"

    @property
    def cost(self) -> Cost:
        """No extra row."""
        return Cost()

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The layer that is computed twice, and the last one."""
        return not self._off and layer in (self.layer, anatomy.n_layers - 1)

    def acts_now(self, state: _State | None, layer: int) -> bool:
        """Attention rows are wanted in the chosen layer only."""
        return layer == self.layer

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Checks the layer, and that the last layer has the parts the carried output passes."""
        last = anatomy.n_layers - 1
        if self.layer >= last:
            raise ValueError(f"ONLY: layer must be below the last layer, {last}, got {self.layer}.")
        anatomy.o_proj(self.layer)
        anatomy.input_norm(last)
        anatomy.mlp(last)
        return []

    def begin(self, prompt: Prompt) -> _State | None:
        """Notes which columns are text and which are image."""
        if self._off:
            return None
        layout = prompt.layout
        text = layout.real & ~layout.visual
        first = text & (text.long().cumsum(-1) == 1)  # a sink that belongs to no modality
        return _State(prompt, text & ~first, layout.visual)

    def weights(
        self,
        state: _State | None,
        layer: int,
        rows: Int[Tensor, "B R"],
        a: Float[Tensor, "B H R K"],
    ) -> None:
        """Computes the textual output of the last row and leaves the weights as they are."""
        if state is None or layer != self.layer:
            return
        new = a.shape[-1] - state.text.shape[1]
        text = functional.pad(state.text, (0, new), value=True)
        visual = functional.pad(state.visual, (0, new), value=False)
        last = drop_outliers(drop_outliers(a[:, :, -1], text), visual)
        heads = textual_heads(entropy_ratio(last, text, visual))
        y = state.prompt.attend((last * heads[..., None])[:, :, None])
        # Past the hooks: gains on heads belong to the model's own pass.
        state.now["textual"] = state.prompt.anatomy.o_proj(layer).forward(y[:, -1].flatten(1))

    def layer_in(self, state: _State | None, layer: int, x: Float[Tensor, "B L D"]) -> None:
        """Keeps the last layer's input at the last position."""
        if state is not None and layer == state.prompt.anatomy.n_layers - 1:
            state.now["residual"] = x[:, -1].clone()  # a view would keep the whole prompt alive

    def logits(
        self, state: _State | None, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """Carries the textual output through the last layer's MLP and compares."""
        if state is None:
            return None
        anatomy = state.prompt.anatomy
        last = anatomy.n_layers - 1
        x = anatomy.input_norm(last).forward(state.now["textual"])
        x = anatomy.feed_forward(last, self.residual_share * state.now["residual"] + x)
        textual = anatomy.exit_logits(x)
        return contrast_or_collaborate(
            z["main"],
            textual,
            distance(z["main"], textual, whole_batch=self.distance_over_batch),
            gamma=self.gamma,
            collaborate=self.collaborate,
            contrast=self.contrast,
        )
