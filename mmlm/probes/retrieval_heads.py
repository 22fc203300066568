"""Retrieval heads: attention heads that copy from the prompt.

Paper: "Retrieval Head Mechanistically Explains Long-Context Factuality", Wu et al., arXiv
2404.15574. Authors' code: nightdessert/Retrieval_Head @3ac171a (without a licence file),
``retrieval_head_detection.py``; nothing is copied.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mmlm.engine.method import Paper, Prompt, Rows
from mmlm.probes.layer_probe import LayerProbe, check_rows, check_shown

__all__ = ["RetrievalHeads"]


@dataclass
class _State:
    """What is kept for one prompt.

    Attributes:
        layers: Those that are measured.
        first: int64 [B]; first real position of each row.
        seen: Positions so far, by layer.
        peaks: Per layer int64 [B, H] for every token.
    """

    layers: tuple[int, ...]
    first: Tensor
    seen: dict[int, int] = field(default_factory=dict)
    peaks: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class RetrievalHeads(LayerProbe):
    """Measures at which position of the sequence each head looks while each token is written.

    Idea:
        When a model repeats something of its prompt, a few heads look at the very token that is
        written next. The same heads do it for every prompt; without them it invents.
    Paper:
        "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, 2024.
    Equations:
        None is numbered in the sources read; from the code: ``hit = [a <= j* < e and p[j*] =
        w_s]`` with ``j* = argmax_j r_j``, the needle at [a, e) of the prompt p and w_s the token
        that the row r produces: :func:`mmlm.engine.head_scores.retrieval_scores`.
    Acts at:
        ``weights`` (looks, behind the edits of all other methods) of the row that produces each
        token, in the chosen layers.
    Cost:
        No extra forward. Per token and layer one row of attention weights is computed again.
        Memory: one number per token and head.
    Parameters:
        layers: Decoder layers, each >= 0. None: all.
    Shapes:
        B rows, H query heads, R query rows, K keys.
    State:
        Per prompt: the peaks of every token.
    Differs:
        The needle is searched for exactly; the authors' search is early by up to three positions.
        A run without a needle is not counted; theirs scores 0. The rate of distinct hits, which
        never exceeds 1, stands beside the authors' count.
    Limits:
        Beam search is refused, and so are methods that remove image positions. Peaks are those of
        rows, so that a head that looks at two places is known by the stronger one.

    Raises:
        ValueError: for layers that the model does not have.

    Example:
        with RetrievalHeads()(model):
            ids = model.generate(**inputs, max_new_tokens=50)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title="Retrieval Head Mechanistically Explains Long-Context Factuality",
        arxiv="2404.15574",
        year=2024,
        venue="ICLR 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})
    needs_all_visual: ClassVar[bool] = True
    measures: ClassVar[str] = "retrieval_heads"

    @property
    def rows(self) -> Rows:
        """The last row of each pass."""
        return "last"

    def begin(self, prompt: Prompt) -> _State:
        """Notes where each row begins."""
        return _State(self.layers_of(prompt.anatomy), prompt.layout.real.long().argmax(-1))

    def weights(
        self, state: _State, layer: int, rows: Int[Tensor, "B R"], a: Float[Tensor, "B H R K"]
    ) -> Float[Tensor, "B H R K"] | None:
        """Notes the row's peak; changes nothing."""
        keys, before = a.shape[-1], state.seen.get(layer)
        state.seen[layer] = keys
        if before is not None and keys != before + 1:  # a new turn: its answer begins
            state.peaks.pop(layer)
        state.peaks.setdefault(layer, []).append(a[:, :, -1].argmax(-1))
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row, in plain JSON.

        Returns:
            Dictionaries with ``layers`` and ``peaks`` [token][layer][head]: positions, counted
            from the first real token of the row; those behind the prompt are new tokens.

        Raises:
            ValueError: If ``tokens`` are not one number per row.
            HiddenAttention: If the model's attention never showed its rows in some layer.
        """
        n_rows = state.first.shape[0]
        check_rows(tokens, n_rows)
        layers = list(state.layers)
        check_shown(layers, state.peaks)
        peaks = torch.stack([torch.stack(state.peaks[n]) for n in layers], 2)
        peaks = (peaks - state.first[:, None, None]).cpu()
        lengths = [len(peaks)] * n_rows if tokens is None else tokens
        return [
            {"layers": layers, "peaks": peaks[:n, row].tolist()} for row, n in enumerate(lengths)
        ]
