"""VCD: visual contrastive decoding.

Paper: "Mitigating Object Hallucinations in Large Vision-Language Models through Visual Contrastive
Decoding", Leng et al., CVPR 2024, arXiv 2311.16922.
Sources read: the paper and the authors' repository DAMO-NLP-SG/VCD (Apache-2.0) for its defaults;
no code is copied.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Float
from torch import Tensor

from mmlm.engine.branches.branch import Branch, Noised
from mmlm.engine.method import Method, Paper
from mmlm.engine.vision.pixels import NOISE_STEPS, signal_kept

__all__ = ["VCD", "contrast", "signal_kept"]


def contrast(
    clear: Float[Tensor, "B V"], noised: Float[Tensor, "B V"], alpha: float
) -> Float[Tensor, "B V"]:
    """Delta on the clear logits (Eq. 3): ``(1 + a) z(v) - a z(v') - z(v) = a (z(v) - z(v'))``."""
    return alpha * (clear - noised)


@dataclass(frozen=True, kw_only=True)
class VCD(Method):
    """Subtracts what the model would say about a noised image.

    Idea:
        A noised image leaves the language prior and takes the evidence away. What the model still
        says about it is prior, and is subtracted from its logits.
    Paper:
        "Mitigating Object Hallucinations in Large Vision-Language Models through Visual
        Contrastive Decoding", arXiv 2311.16922, CVPR 2024.
    Equations:
        (2) ``v' = sqrt(abar_t) v + sqrt(1 - abar_t) eps``: :func:`signal_kept`.
        (3) ``z' = (1 + alpha) z(v) - alpha z(v')``: :func:`contrast`.
        (4) tokens with ``p < beta * max p`` under the clear image are cut:
        :func:`mmlm.engine.combine.edit_logits`.
    Acts at:
        ``logits``, every step, prefill and decode.
    Cost:
        One more prefill with its own tower pass per prompt; one more row per row and token, in the
        same forward pass inside ``generate``. Memory: a second set of cache rows.
    Parameters:
        alpha: Strength of the contrast, >= 0. Default 1.0 (authors' POPE script; their sampler
            falls back to 0.5). Neutral 0.
        beta: Plausibility cut, in [0, 1]. Default 0.2 (POPE script; fallback 0.1). Neutral 0.
        noise_step: Diffusion step t, 0 to 999. Default 500 (authors' scripts).
        seed: Seed of the noise, >= 0. Default 55 (the seed of the authors' script).
    Shapes:
        B rows, V vocabulary.
    State:
        None.
    Differs:
        The noise is drawn once per seed and image size, not once per run, so that a row's answer
        does not depend on its batch; vary ``seed`` for other draws.
        The paper samples; this works with any decoding of ``generate``. Rows without an image are
        left alone.
    Limits:
        Pictures, no videos. ``generate`` must get the pictures, not encoded features.

    Raises:
        ValueError: for a parameter out of range.
        LayoutError: at the first forward, without pixel inputs.

    Example:
        with VCD(alpha=1.0, beta=0.2)(model):
            ids = model.generate(**inputs, do_sample=True)
    """

    paper: ClassVar[Paper] = Paper(
        title="Mitigating Object Hallucinations in Large Vision-Language Models through Visual "
        "Contrastive Decoding",
        arxiv="2311.16922",
        year=2024,
        venue="CVPR 2024",
    )

    alpha: float = 1.0
    beta: float = 0.2
    noise_step: int = 500
    seed: int = 55

    def __post_init__(self) -> None:
        self._check_number("alpha", at_least=0)
        self._check_number("beta", at_least=0, at_most=1)
        self._check_integer("noise_step", at_least=0, at_most=NOISE_STEPS - 1)
        self._check_integer("seed", at_least=0)

    @classmethod
    def pope(cls) -> VCD:
        """The authors' POPE script: alpha 1, beta 0.2, step 500."""
        return cls(alpha=1.0, beta=0.2)

    @classmethod
    def sampler(cls) -> VCD:
        """The fallbacks in the authors' sampler: alpha 0.5, beta 0.1."""
        return cls(alpha=0.5, beta=0.1)

    def neutral(self) -> VCD:
        """Alpha = 0 and beta = 0."""
        return type(self)(alpha=0.0, beta=0.0)

    @property
    def noised(self) -> Noised:
        """The auxiliary prompt."""
        return Noised(kept=signal_kept(self.noise_step), seed=self.seed)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The noised image; none if there is nothing to contrast."""
        return (self.noised,) if self.alpha > 0 else ()

    @property
    def plausibility(self) -> float:
        """The cut beta."""
        return self.beta

    def logits(
        self, state: Any, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """The contrast with the noised image."""
        if self.alpha == 0:
            return None
        return contrast(z["main"], z[self.noised], self.alpha)
