"""ACT: attention calibration at sinks other than the first token.

Paper: "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models without
Training through Attention Calibration", Yu et al., ICML 2024, arXiv 2406.15765.
Sources read: the authors' code (GATECH-EIC/ACT, without a licence file) and the abstract; the
paper's own body was not read. Nothing is copied from the code.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.engine.selections import HeadSet, check_heads, read_heads

__all__ = ["ACT", "calibrate", "column_means", "without_first"]


def column_means(
    column_sums: Float[Tensor, "B H N"],
) -> Float[Tensor, "B H N"]:
    """Mean weight of each key over the N - j rows that can see it."""
    n = column_sums.shape[-1]
    return column_sums / torch.arange(n, 0, -1, device=column_sums.device)


def without_first(
    sinks: Bool[Tensor, "B *H K"], first: Int[Tensor, "B"] | None
) -> Bool[Tensor, "B *H K"]:
    """The sinks but the one that must stay, taken to be the begin-of-text token.

    Args:
        sinks: Keys above the threshold.
        first: The first real position of each row; None: whichever key was detected first, as the
            authors' code has it.
    """
    if first is None:
        return sinks & (sinks.cumsum(-1) > 1)
    index = torch.arange(sinks.shape[-1], device=sinks.device)
    return sinks & (index != first.view(-1, *(1,) * (sinks.ndim - 1)))


def calibrate(
    a: Float[Tensor, "B H R K"], sinks: Bool[Tensor, "B H #R K"], beta: float
) -> Float[Tensor, "B H R K"]:
    """Keeps ``beta`` of the attention on sinks and spreads the rest over all other keys.

    The others, the first token among them, receive in proportion to what they have. A row whose
    attention is on sinks alone stays as it is.
    """
    taken = a * sinks
    sink = taken.sum(-1, keepdim=True)
    other = (a - taken).sum(-1, keepdim=True)
    gain = 1 + (1 - beta) * sink / other.clamp(min=torch.finfo(a.dtype).tiny)
    return torch.where(other > 0, torch.where(sinks, beta * a, gain * a), a)


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        real: Bool [B, N].
        first: int64 [B]; first real position.
        heads: int64 [h] by layer; the selected heads.
        sums: fp32 [B, h, N] by layer; attention on each key, summed over the rows seen so far.
        sinks: Bool [B, h, N] by layer; known once all rows were seen.
        acts: Whether a layer has any sink.
    """

    real: Tensor
    first: Tensor
    heads: dict[int, Tensor]
    sums: dict[int, Tensor] = field(default_factory=dict)
    sinks: dict[int, Tensor] = field(default_factory=dict)
    acts: dict[int, bool] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class ACT(Method):
    """Takes attention from sinks other than the first token in selected heads.

    Idea:
        Later tokens become attention sinks too, and not all of them help. In heads where it helps
        on labelled data, such sinks are scaled down and the freed weight goes to all other tokens.
    Paper:
        "Unveiling and Harnessing Hidden Attention Sinks", arXiv 2406.15765, ICML 2024.
    Equations:
        None is numbered in the sources read; from the code:
        ``c_j = sum_i A_ij / (N - j)``: :func:`column_means`; sinks where ``c_j > theta``, but the
        first token: :func:`without_first`.
        ``A'_ij = beta A_ij`` on sinks, ``A_ij + (1 - beta) S_i A_ij / (1 - S_i)`` elsewhere, with
        S_i the row's attention on sinks: :func:`calibrate`.
    Acts at:
        ``weights`` of all rows of the selected heads, at the prefill and of every new token; sinks
        are found at the prefill, from one look at all rows before any is changed.
    Cost:
        No extra forward. At the prefill two passes over the attention weights of a layer with
        selected heads, in chunks; per token one row. Memory: 2 N numbers per selected head.
    Parameters:
        heads_by_layer: The selected heads as ((layer, (head, ...)), ...), as ((layer, head), ...),
            or the path of a map of heads. None: unknown, so that attaching is refused; ``mmlm
            calibrate heads`` finds them on labelled questions. The authors' sets are for
            LLaMA-2-7B-chat on text; none is published for a model that sees.
        beta: Fraction of a sink's attention that is kept, in [0, 1]. Default 0.4 (authors' code).
            Neutral 1.
        theta: Least mean attention of a sink, in [0, 1]. Default 0.1 (authors' code).
        detect: "prompt": the prompt's sinks hold for all new tokens (default, ours). "row": for
            a new token every key above theta in its own row counts (authors' code).
        first: Which sink is left alone. "position": the first real token (default, ours).
            "detected": the first key above theta, whatever it is (authors' code).
    Shapes:
        B rows, H query heads (h selected ones), R query rows, K keys, N prompt positions.
    State:
        Per prompt: column sums and sinks of the selected heads.
    Differs:
        The first token is left alone by its position; where it is below theta, the code spares a
        real sink instead: ``first="detected"``.
        New tokens use the prompt's sinks; the code looks at each new row: ``detect="row"``.
        theta is absolute, as in the code; others quote the paper's threshold as a multiple of 1/N.
        Left padding counts neither as key nor as row; the code runs one prompt at a time.
        A row with attention on sinks alone is left alone; the code divides by zero.
    Limits:
        Prompts without an image are left alone, like with every method here. Chunked prefill is
        refused: the column means need all rows.

    Raises:
        ValueError: for a parameter out of range, or a head that the model does not have.
        UnsupportedModel: if no heads are given.

    Example:
        with ACT(heads_by_layer=((3, (0, 5)), (7, (2,))))(model):
            ids = model.generate(**inputs, max_new_tokens=64)
    """

    paper: ClassVar[Paper] = Paper(
        title=(
            "Unveiling and Harnessing Hidden Attention Sinks: Enhancing Large Language Models "
            "without Training through Attention Calibration"
        ),
        arxiv="2406.15765",
        year=2024,
        venue="ICML 2024",
    )
    rewinds: ClassVar[bool] = True

    heads_by_layer: HeadSet | None = None
    beta: float = 0.4
    theta: float = 0.1
    detect: Literal["prompt", "row"] = "prompt"
    first: Literal["position", "detected"] = "position"

    def __post_init__(self) -> None:
        self._check_number("beta", at_least=0, at_most=1)
        self._check_number("theta", at_least=0, at_most=1)
        self._check_choice("detect", ("prompt", "row"))
        self._check_choice("first", ("position", "detected"))
        if self.heads_by_layer is not None:
            heads = read_heads("ACT", "heads_by_layer", self.heads_by_layer)
            object.__setattr__(self, "heads_by_layer", heads)

    def neutral(self) -> ACT:
        """Sinks keep all of their attention."""
        return type(self)(beta=1.0)

    @property
    def rows(self) -> Rows:
        """All rows: what they write into the cache is used later."""
        return "all"

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """Layers with selected heads."""
        return self.beta < 1 and any(layer == at for at, _ in self.heads_by_layer or ())

    def acts_now(self, state: _State, layer: int) -> bool:
        """Not where the prompt has no sink but the first token."""
        return self.detect == "row" or state.acts.get(layer, True)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs selected heads."""
        if self.heads_by_layer is not None:
            check_heads("ACT", self.heads_by_layer, anatomy)
        elif self.beta < 1:
            return ["no heads are given; `mmlm calibrate heads` finds them on labelled questions"]
        return []

    def begin(self, prompt: Prompt) -> _State:
        """Notes the first real positions."""
        real = prompt.layout.real
        heads = {
            layer: torch.tensor(chosen, device=real.device)
            for layer, chosen in self.heads_by_layer or ()
        }
        return _State(real, real.long().argmax(-1), heads)

    def survey(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> None:
        """Sums the prompt's attention on each key over the real rows."""
        if layer in state.sinks or a.shape[-1] != state.real.shape[1]:
            return
        real = state.real.gather(1, rows)[:, None, :, None]
        sums = (a[:, state.heads[layer]] * real).sum(2)
        state.sums[layer] = state.sums[layer] + sums if layer in state.sums else sums

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"]:
        """Calibrates the selected heads."""
        heads = state.heads[layer]
        if layer not in state.sinks:
            means = column_means(state.sums.pop(layer))
            state.sinks[layer] = without_first(means > self.theta, self._spared(state))
            # The one read-back per layer and prompt: later steps skip layers without sinks.
            state.acts[layer] = bool(state.sinks[layer].any())
        picked = a[:, heads]
        sinks = state.sinks[layer][:, :, None]
        new = a.shape[-1] - sinks.shape[-1]
        if new and self.detect == "row":
            sinks = without_first(picked > self.theta, self._spared(state))
        elif new:
            sinks = functional.pad(sinks, (0, new))
        return a.index_copy(1, heads, calibrate(picked, sinks, self.beta))

    def _spared(self, state: _State) -> Tensor | None:
        return state.first if self.first == "position" else None
