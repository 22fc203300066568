"""How sure a model was of the tokens that it wrote, collected while it writes.

Used by MIA-DPO (arXiv 2410.17637), whose code takes the perplexity of a greedy answer as
``exp(-mean log max p)`` (Liuziyu77/MIA-DPO, commit a85c51a).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method, Paper, Prompt
from mmlm.probes.layer_probe import check_rows

__all__ = ["Confidence", "log_max"]


def log_max(z: Float[Tensor, "B V"]) -> Float[Tensor, "B"]:
    """Log-probability of the most probable token."""
    return z.float().amax(-1) - z.float().logsumexp(-1)


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        rows: Rows of the batch.
        steps: fp32 [B] for every generated token.
    """

    rows: int
    steps: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class Confidence(Method):
    """Records the log-probability of the most probable token at every step.

    Idea:
        A greedy answer consists of these tokens, so its perplexity costs nothing while it is
        written.
    Paper:
        "MIA-DPO: Multi-Image Augmented Direct Preference Optimization For Large Vision-Language
        Models", arXiv 2410.17637, 2024.
    Equations:
        ``exp(-mean over steps of log max_v p_t(v))``.
    Acts at:
        ``logits`` (looks; the model's own logits before the edits of other methods).
    Cost:
        One logsumexp over the vocabulary per token.
    Shapes:
        B rows, V vocabulary.
    State:
        Per prompt: one number per row and token.
    Limits:
        The perplexity of the answer only if decoding is greedy. Beam search is refused.

    Example:
        with Confidence()(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title=(
            "MIA-DPO: Multi-Image Augmented Direct Preference Optimization For Large "
            "Vision-Language Models"
        ),
        arxiv="2410.17637",
        year=2024,
        venue="ICLR 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"logits"})
    measures: ClassVar[str] = "confidence"

    def neutral(self) -> Confidence:
        """Itself: the model is unchanged."""
        return self

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """No decoder layer."""
        return False

    def begin(self, prompt: Prompt) -> _State:
        """Nothing is known yet."""
        return _State(prompt.rows)

    def logits(
        self, state: _State, z: Mapping[Any, Float[Tensor, "B V"]]
    ) -> Float[Tensor, "B V"] | None:
        """Notes the step; changes nothing."""
        state.steps.append(log_max(z["main"]))
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row: ``tokens`` (how many) and ``log_max`` (mean over them).

        Raises:
            ValueError: If ``tokens`` are not one number per row.
        """
        check_rows(tokens, state.rows)
        steps = torch.stack(state.steps).cpu().double()  # [T, B]
        counts = [len(steps)] * state.rows if tokens is None else list(tokens)
        return [
            {"tokens": n, "log_max": float(f"{steps[:n, row].mean():.9g}") if n else None}
            for row, n in enumerate(counts)
        ]
