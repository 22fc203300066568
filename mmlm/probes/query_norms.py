"""How large each head's query is: what a router without parameters chooses heads by.

Paper: "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin et al., ICML 2025, arXiv
2410.11842, whose language models keep the heads with the largest query norms. Authors' code:
SkyworkAI/MoH @2cefd57 (Apache-2.0), ``MoH-LLaMA3``; nothing is copied. A model that was not trained
with such a router loses a random quarter of its heads by it; here it only ranks heads, beside other
rankings.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Paper, Prompt
from mmlm.engine.mixture_of_heads import norm_shares
from mmlm.probes.layer_probe import LayerProbe, check_rows, short

__all__ = ["QueryNorms"]


@dataclass(eq=False)
class _State:
    """What is kept for one prompt.

    Attributes:
        prompt: Tells the model's parts, and a prompt's first pass from later ones.
        layers: Those that are measured.
        rows: Rows of the batch.
        shares: Per layer fp32 [B, H] for every token: shares of the row that produced it.
    """

    prompt: Prompt
    layers: tuple[int, ...]
    rows: int
    shares: dict[int, list[Tensor]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class QueryNorms(LayerProbe):
    """Measures how large the query of each head is beside those of its layer, token by token.

    Idea:
        A head whose query is small looks at everything alike, and so brings little. A router that
        needs no training keeps the heads with large queries. Are they those that see?
    Paper:
        "MoH: Multi-Head Attention as Mixture-of-Head Attention", arXiv 2410.11842, ICML 2025.
    Equations:
        ``n_h = ||q_h||`` of the query projection before rotation, ``p = softmax(n / std(n))`` over
        the heads of a layer: :func:`mmlm.engine.mixture_of_heads.norm_shares`.
    Acts at:
        ``layer_in`` (looks) of the row that produces each token, in the chosen layers.
    Cost:
        No extra forward. Per token and layer one norm and one query projection of one position.
        Memory: one number per token, layer and head.
    Parameters:
        layers: Decoder layers, each >= 0. None: all.
    Shapes:
        B rows, H query heads, D width, L new positions.
    State:
        Per prompt: the shares of every token.
    Differs:
        All heads of a layer are compared; the authors always keep the lower half and route the
        rest (:func:`mmlm.engine.mixture_of_heads.norm_routed`).
    Limits:
        Beam search is refused. Where several answers are written on one kept cache the last is
        measured. What other methods do to a layer's input later in the list is not seen.

    Raises:
        ValueError: for layers that the model does not have.
        UnsupportedModel: if the model's attention has no query projection of its own.

    Example:
        with QueryNorms()(model):
            ids = model.generate(**inputs, max_new_tokens=64)
            records = mmlm.measured(model)
    """

    paper: ClassVar[Paper] = Paper(
        title="MoH: Multi-Head Attention as Mixture-of-Head Attention",
        arxiv="2410.11842",
        year=2024,
        venue="ICML 2025",
    )
    only_looks: ClassVar[frozenset[str]] = frozenset({"layer_in"})
    measures: ClassVar[str] = "query_norms"

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Needs a query projection and the norm before it."""
        super().unsupported(anatomy)
        layer = self.layers_of(anatomy)[0]
        name = type(anatomy.attention(layer)).__name__
        if getattr(anatomy.attention(layer), "q_proj", None) is None:
            return [f"the attention of its layers ({name}) has no q_proj"]
        if not anatomy.has_input_norm(layer):
            return [f"it has no norm before the attention of its layers ({name})"]
        return []

    def begin(self, prompt: Prompt) -> _State:
        """Nothing is known before."""
        return _State(prompt, self.layers_of(prompt.anatomy), prompt.rows)

    def layer_in(
        self, state: _State, layer: int, x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"] | None:
        """Notes the shares of the last position; changes nothing."""
        anatomy = state.prompt.anatomy
        steps = state.shares.setdefault(layer, [])
        if x.shape[1] > 1 or not state.prompt.past:  # a prompt, or another turn: an answer begins
            steps.clear()
        # Past the hooks on these modules: they belong to the model's own pass.
        y = anatomy.input_norm(layer).forward(x[:, -1:])
        q = anatomy.attention(layer).q_proj.forward(y)[:, -1]
        steps.append(norm_shares(q.unflatten(-1, (anatomy.n_heads, -1)).float()))
        return None

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """One record per row, in plain JSON.

        Returns:
            Dictionaries with ``layers``, ``tokens`` (rows that were measured) and ``shares`` (per
            layer and head, mean over tokens; a layer's sum to 1; None without tokens).

        Raises:
            ValueError: If ``tokens`` are not one number per row.
        """
        check_rows(tokens, state.rows)
        steps = [torch.stack(state.shares[layer]) for layer in state.layers]
        every = torch.stack(steps, dim=2).cpu().double()  # [tokens, B, layers, H]
        counts = [len(every)] * state.rows if tokens is None else tokens
        return [
            {
                "layers": list(state.layers),
                "tokens": min(n, len(every)),
                "shares": short(every[:n, row].mean(0).tolist()) if n else None,
            }
            for row, n in enumerate(counts)
        ]
