"""PAI: pay attention to image.

Paper: "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in
LVLMs", Liu et al., ECCV 2024, arXiv 2407.21771.
Sources read: a specification of the method's equations and of the authors' repository LALBJ/PAI;
no code is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.branches.branch import Branch, NoImage
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import check_layers

__all__ = ["PAI", "boost", "guidance"]


def boost(
    s: Float[Tensor, "B H R K"], image: Bool[Tensor, "B K"], alpha: float
) -> Float[Tensor, "B H R K"]:
    """Delta on the scores before the softmax: ``alpha |s|`` on image keys, 0 elsewhere."""
    return (alpha * s.abs()).masked_fill(~image[:, None, None, :], 0)


def guidance(
    main: Float[Tensor, "B V"], without: Float[Tensor, "B V"], gamma: float
) -> Float[Tensor, "B V"]:
    """Delta on the main logits: ``(gamma - 1) (log p - log p_txt)``.

    ``log p' = gamma (log p - log p_txt) + log p_txt`` is ``log p`` plus this, and raw logits are
    ``log p`` plus a constant of the row, which no softmax sees.
    """
    return (gamma - 1) * (main.log_softmax(-1) - without.log_softmax(-1))


@dataclass(frozen=True)
class _State:
    """Image positions of the prompt, bool [B, N]."""

    image: Tensor


@dataclass(frozen=True, kw_only=True)
class PAI(Method):
    """Raises attention on the image and subtracts what the text alone would say.

    Idea:
        Models lean on their own words. PAI makes every score of an image key larger by a share of
        its size before the softmax, and moves the result away from the prediction of the same
        prompt without its image.
    Paper:
        "Paying More Attention to Image: A Training-Free Method for Alleviating Hallucination in
        LVLMs", arXiv 2407.21771, ECCV 2024.
    Equations:
        ``s' = s + alpha |s|`` on image keys: :func:`boost`.
        ``log p' = gamma (log p - log p_txt) + log p_txt``: :func:`guidance`.
        Tokens with ``log p < log beta + max log p`` are cut:
        :func:`mmlm.engine.combine.edit_logits`.
    Acts at:
        ``scores`` of the last query from ``first_layer`` on, all heads, prefill and decode;
        ``logits`` at every step.
    Cost:
        One more prefill without the image per prompt and one more row per row and token, both
        without the boost, in the same forward pass inside ``generate``; none for gamma = 1. Last
        attention rows of the boosted layers are computed again. Memory: a second set of cache
        rows.
    Parameters:
        alpha: Share of a score's size that is added, >= 0. Default 0.2 (README). Neutral 0.
        gamma: Strength of the guidance, >= 0. Default 1.1 (README's commands; argparse in the
            code says 2). Neutral 1: no second prompt and no cut.
        beta: Plausibility cut with the guidance, in [0, 1]. Default 0.1 (code).
        first_layer: First decoder layer that is boosted, 0-based. Default 2 (code).
        last_layer: Last one, included. Default None: the model's last (code: 31 of 0 to 31).
    Shapes:
        B rows, H query heads, R rows asked for, K keys, V vocabulary.
    State:
        Positions of the image.
    Differs:
        The delta leaves out a constant of each row, which changes no probability and no choice;
        the code's sampler gets ``log p'`` itself, whose rows do not sum to 1 in beam search.
        Masked keys are not boosted. Rows without an image are left alone. The prompt without its
        image keeps the chat template.
    Limits:
        Needs attention that the engine can compute again (``mmlm doctor`` says so).

    Raises:
        ValueError: for a parameter out of range or a layer that the model does not have.
        LayoutError: at the first forward, if a prompt holds nothing but an image.

    Example:
        with PAI(alpha=0.2, gamma=1.1)(model):
            ids = model.generate(**inputs, do_sample=True, top_p=0.9)
    """

    paper: ClassVar[Paper] = Paper(
        title="Paying More Attention to Image: A Training-Free Method for Alleviating "
        "Hallucination in LVLMs",
        arxiv="2407.21771",
        year=2024,
        venue="ECCV 2024",
    )

    alpha: float = 0.2
    gamma: float = 1.1
    beta: float = 0.1
    first_layer: int = 2
    last_layer: int | None = None

    def __post_init__(self) -> None:
        self._check_number("alpha", at_least=0)
        self._check_number("gamma", at_least=0)
        self._check_number("beta", at_least=0, at_most=1)
        self._check_integer("first_layer", at_least=0)
        if self.last_layer is not None:
            self._check_integer("last_layer", at_least=self.first_layer)

    @classmethod
    def readme(cls) -> PAI:
        """The commands in the authors' README: alpha 0.2, gamma 1.1."""
        return cls()

    @classmethod
    def argparse(cls) -> PAI:
        """The defaults of the authors' scripts: alpha 0.2, gamma 2."""
        return cls(gamma=2.0)

    def neutral(self) -> PAI:
        """Alpha = 0 and gamma = 1."""
        return type(self)(alpha=0.0, gamma=1.0)

    @property
    def rows(self) -> Rows:
        """The last position of each pass."""
        return "last" if self.alpha > 0 else "none"

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The prompt without its image; none without guidance."""
        return (NoImage(),) if self.gamma != 1 else ()

    @property
    def plausibility(self) -> float:
        """The cut beta, with guidance only."""
        return self.beta if self.gamma != 1 else 0.0

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The boosted layers."""
        last = anatomy.n_layers - 1 if self.last_layer is None else self.last_layer
        return self.alpha > 0 and self.first_layer <= layer <= last

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Nothing beyond what the sites need; checks the layers."""
        last = self.first_layer if self.last_layer is None else self.last_layer
        if self.alpha > 0:
            check_layers("PAI", (last,), anatomy.n_layers)
        return []

    def begin(self, prompt: Prompt) -> _State:
        """Notes where the image is."""
        return _State(prompt.layout.visual)

    def scores(
        self,
        state: _State,
        layer: int,
        rows: Int[Tensor, "B R"],
        s: Float[Tensor, "B H R K"],
    ) -> Float[Tensor, "B H R K"] | None:
        """The boost of the image keys."""
        image = functional.pad(state.image, (0, s.shape[-1] - state.image.shape[1]))
        return boost(s, image, self.alpha)

    def logits(
        self, state: Any, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """The guidance away from the text alone."""
        if self.gamma == 1:
            return None
        return guidance(z["main"], z[NoImage()], self.gamma)
