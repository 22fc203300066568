"""ZeroTuning: scaling the attention on the first token.

Paper: "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models without
Training", Han et al., ICLR 2026, arXiv 2505.11739.
Sources read: the authors' code (FeijiangHan/ZeroTuning, without a licence file), and abstracts and
notes on versions 1 to 3 of the paper. Nothing is copied from the code.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import HeadSet, check_heads, read_heads

__all__ = ["ZeroTuning", "first_key_bias", "scale_first"]


def scale_first(
    a: Float[Tensor, "B H R K"],
    first: Int[Tensor, "B"],
    chosen: Bool[Tensor, "H"],
    gamma: float,
) -> Float[Tensor, "B H R K"]:
    """The weight of the first key times gamma in the chosen heads, rows renormalised.

    ``a_0' = gamma a_0 / D`` and ``a_i' = a_i / D`` with ``D = 1 + (gamma - 1) a_0``. The method
    itself adds :func:`first_key_bias` to the scores, which gives the same weights.
    """
    index = torch.arange(a.shape[-1], device=a.device)
    here = (index == first[:, None])[:, None, None] & chosen[:, None, None]
    more = (gamma - 1) * a * here
    return (a + more) / (1 + more.sum(-1, keepdim=True))


def first_key_bias(
    first: Int[Tensor, "B"], chosen: Bool[Tensor, "H"], n: int, gamma: float
) -> Float[Tensor, "B H 1 N"]:
    """``log(gamma)`` on the score of the first of ``n`` keys in the chosen heads, 0 elsewhere."""
    index = torch.arange(n, device=first.device)
    here = (index == first[:, None])[:, None, None] & chosen[:, None, None]
    return math.log(gamma) * here.float()


@dataclass(frozen=True, kw_only=True)
class ZeroTuning(Method):
    """Scales the attention on the first token in selected heads.

    Idea:
        The first token is an attention sink that says nothing. More weight on it flattens the
        differences among all other tokens, less weight sharpens them.
    Paper:
        "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models without
        Training", arXiv 2505.11739, ICLR 2026.
    Equations:
        None is numbered in the sources read; from the code:
        ``a_0' = gamma a_0 / D, a_i' = a_i / D, D = 1 + (gamma - 1) a_0``: :func:`scale_first`,
        which equals adding ``log(gamma)`` to the score of key 0: :func:`first_key_bias`.
    Acts at:
        ``scores`` of all rows of the selected heads, at the prefill and of every new token.
    Cost:
        No extra forward. The attention of layers with selected heads is computed twice, in chunks
        at the prefill, one row per token. Memory: H N numbers per such layer.
    Parameters:
        gamma: Factor of the first token's weight, > 0. Default 1.5 (ours: no table of the paper
            could be read; by its abstract classification gains above 1, answering below 1).
            Neutral 1.
        heads_by_layer: The selected heads as ((layer, (head, ...)), ...), as ((layer, head), ...),
            or the path of a map of heads. None: unknown, attaching is refused; ``mmlm calibrate
            heads`` profiles every head on labelled questions.
    Shapes:
        B rows, H query heads, R query rows, K keys, N prompt positions.
    State:
        Per prompt: the bias of each layer with selected heads.
    Differs:
        The first token is the first real one; the code takes key 0, which may be padding.
        The bias form replaces multiply and renormalise; both agree to rounding.
        Two groups of heads with different gamma are two methods: biases add, so
        ``attach(model, ZeroTuning(gamma=1.5, ...), ZeroTuning(gamma=0.7, ...))`` has them both.
    Limits:
        Prompts without an image are left alone, like with every method here. The unsupervised
        choice of gamma by least entropy is not built in; sweep gamma instead.

    Raises:
        ValueError: for a parameter out of range, or a head that the model does not have.
        UnsupportedModel: if no heads are given.

    Example:
        with ZeroTuning(gamma=1.5, heads_by_layer=((1, (0, 3)),))(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title=(
            "ZeroTuning: Unlocking the Initial Token's Power to Enhance Large Language Models "
            "without Training"
        ),
        arxiv="2505.11739",
        year=2026,
        venue="ICLR 2026",
    )
    rewinds: ClassVar[bool] = True

    gamma: float = 1.5
    heads_by_layer: HeadSet | None = None

    def __post_init__(self) -> None:
        self._check_number("gamma", above=0)
        if self.heads_by_layer is not None:
            heads = read_heads("ZeroTuning", "heads_by_layer", self.heads_by_layer)
            object.__setattr__(self, "heads_by_layer", heads)

    def neutral(self) -> ZeroTuning:
        """Gamma = 1."""
        return type(self)(gamma=1.0)

    @property
    def rows(self) -> Rows:
        """All rows: what they write into the cache is used later."""
        return "all"

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Layers with selected heads."""
        return self.gamma != 1 and any(layer == at for at, _ in self.heads_by_layer or ())

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs selected heads."""
        if self.heads_by_layer is not None:
            check_heads("ZeroTuning", self.heads_by_layer, anatomy)
        elif self.gamma != 1:
            return [
                "no heads are given; `mmlm calibrate heads` profiles them on labelled questions"
            ]
        return []

    def begin(self, prompt: Prompt) -> dict[int, Tensor]:
        """Makes the bias of each layer."""
        real = prompt.layout.real
        first, n = real.long().argmax(-1), real.shape[1]
        state = {}
        for layer, heads in self.heads_by_layer or ():
            chosen = torch.zeros(prompt.anatomy.n_heads, dtype=torch.bool)
            chosen[list(heads)] = True
            state[layer] = first_key_bias(first, chosen.to(real.device), n, self.gamma)
        return state

    def scores(
        self,
        state: dict[int, Tensor],
        layer: int,
        rows: Int[Tensor, "B R"],
        s: Float[Tensor, "B H R K"],
    ) -> Float[Tensor, "B H 1 K"]:
        """The bias on the first real key; new tokens have none."""
        bias = state[layer]
        return functional.pad(bias, (0, s.shape[-1] - bias.shape[-1]))
