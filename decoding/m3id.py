"""M3ID: multi-modal mutual information decoding.

Paper: "Multi-Modal Hallucination Control by Visual Information Grounding", Favero et al., CVPR
2024, arXiv 2403.14003.
Sources read: summaries of the method's equations; there is no official code. Defaults come from
the re-implementations named below; no code is copied.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from jaxtyping import Bool, Float
from torch import Tensor

from mmlm.engine.branches.branch import Branch, NoImage
from mmlm.engine.method import Method, Paper, Prompt

__all__ = ["M3ID", "confident", "contrast", "weight"]

_LARGEST_EXPONENT = 80.0


def weight(step: int, decay: float) -> float:
    """``(1 - g_t) / g_t`` with ``g_t = exp(-lambda t)``, i.e. ``exp(lambda t) - 1``.

    The exponent stops growing at 80, where the product with a logit is still a number in fp32.
    """
    return math.expm1(min(decay * step, _LARGEST_EXPONENT))


def contrast(
    main: Float[Tensor, "B V"], without: Float[Tensor, "B V"], factor: float
) -> Float[Tensor, "B V"]:
    """Delta on the main logits: ``factor * (z - z_noimg)``."""
    return factor * (main - without)


def confident(main: Float[Tensor, "B V"], gate: float) -> Bool[Tensor, "B 1"]:
    """Rows whose likeliest token has at least probability ``gate``."""
    return main.log_softmax(-1).amax(-1, keepdim=True) >= math.log(gate)


@dataclass
class _State:
    """Number of the next token, counted from 0."""

    step: int = 0


@dataclass(frozen=True, kw_only=True)
class M3ID(Method):
    """Prefers tokens that the image makes likelier, more so the longer the answer is.

    Idea:
        With every generated token a model attends less to its image. M3ID adds the information
        that the image carries about the next token, the difference to the logits without image,
        with a weight that grows with the position in the answer.
    Paper:
        "Multi-Modal Hallucination Control by Visual Information Grounding", arXiv 2403.14003,
        CVPR 2024.
    Equations:
        ``z' = z + 1[max log p < log gate] (1 - g_t) / g_t (z - z_noimg)``: :func:`contrast`, gate:
        :func:`confident`; ``g_t = exp(-lambda t)``: :func:`weight`.
    Acts at:
        ``logits``, every step, prefill and decode.
    Cost:
        One more prefill without the image per prompt; one more row per row and token, in the same
        forward pass inside ``generate``. Memory: a second set of cache rows.
    Parameters:
        decay: lambda, how fast ``g_t`` falls per token, >= 0. Default 0.02 (paper). Neutral 0.
        gate: Rows whose likeliest token has at least this probability are left alone, in (0, 1];
            None: no gate. Default None (the re-implementation in the ONLY repository; mitigv
            uses 0.3).
        first_step: The first token's t, >= 0. Default 0 (ONLY's repository: the first token is
            untouched; mitigv counts from 1).
        beta: Plausibility cut, in [0, 1]. Default 0.1 (ONLY's repository; mitigv has none).
            Neutral 0.
    Shapes:
        B rows, V vocabulary.
    State:
        The number of the next token.
    Differs:
        The image is deleted from the prompt's tokens and the chat template stays, whatever the
        template would do without an image. Rows without an image are left alone.
        The paper prints both a gate and none of the re-implementations' cuts; both are switches.
    Limits:
        Needs nothing but logits; runs with every attention kernel.

    Raises:
        ValueError: for a parameter out of range.
        LayoutError: at the first forward, if a prompt holds nothing but an image.

    Example:
        with M3ID(decay=0.02)(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title="Multi-Modal Hallucination Control by Visual Information Grounding",
        arxiv="2403.14003",
        year=2024,
        venue="CVPR 2024",
    )

    decay: float = 0.02
    gate: float | None = None
    first_step: int = 0
    beta: float = 0.1

    def __post_init__(self) -> None:
        self._check_number("decay", at_least=0)
        if self.gate is not None:
            self._check_number("gate", above=0, at_most=1)
        self._check_integer("first_step", at_least=0)
        self._check_number("beta", at_least=0, at_most=1)

    @classmethod
    def only(cls) -> M3ID:
        """As re-implemented in ONLY's repository: t from 0, no gate, cut at 0.1."""
        return cls()

    @classmethod
    def mitigv(cls) -> M3ID:
        """As re-implemented in mitigv: t from 1, gate 0.3, no cut."""
        return cls(gate=0.3, first_step=1, beta=0.0)

    def neutral(self) -> M3ID:
        """Decay = 0 and beta = 0."""
        return type(self)(decay=0.0, beta=0.0)

    @property
    def branches(self) -> tuple[Branch, ...]:
        """The prompt without its image; none if nothing is added."""
        return (NoImage(),) if self.decay > 0 else ()

    @property
    def plausibility(self) -> float:
        """The cut beta."""
        return self.beta

    def begin(self, prompt: Prompt) -> _State:
        """Starts counting tokens."""
        return _State(self.first_step)

    def logits(
        self, state: Any, z: Mapping[Branch | Literal["main"], Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """The weighted difference to the logits without image."""
        if self.decay == 0:
            return None
        factor = weight(state.step, self.decay)
        state.step += 1
        main = z["main"]
        if factor == 0:
            return None
        delta = contrast(main, z[NoImage()], factor)
        if self.gate is None:
            return delta
        return delta.masked_fill(confident(main, self.gate), 0)
