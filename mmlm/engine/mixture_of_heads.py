"""Which heads a router would keep, and how much cache each head would get. Pure functions.

Papers: "MoH: Multi-Head Attention as Mixture-of-Head Attention", Jin et al., ICML 2025, arXiv
2410.11842, code SkyworkAI/MoH @2cefd57 (Apache-2.0); "SparseMM: Head Sparsity Emerges from Visual
Concept Responses in MLLMs", Wang et al., ICCV 2025, arXiv 2506.05344, code CR400AF-A/SparseMM
@f52655b (without a licence file). Nothing is copied. Neither is a method here: a router on a model
that was not trained with it drops heads at random, and no cache is shortened per head. What they
say about heads is compared with other rankings (:class:`mmlm.QueryNorms`).
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["cache_budget", "load_balance", "moh_gates", "norm_routed", "norm_shares"]


def moh_gates(
    x: Float[Tensor, "*B D"],
    routed: Float[Tensor, "E D"] | None,
    shared: Float[Tensor, "S D"] | None,
    split: Float[Tensor, "2 D"] | None,
    active: int,
) -> Float[Tensor, "*B H"]:
    """Factors of all heads for each token, shared heads first: ``sum_h g_h W_h y_h``.

    ``g_h = w_1 S softmax(W_s x)_h`` for shared heads, ``w_2 K p_h / sum over the K largest of p``
    for routed ones with ``p = softmax(W_r x)``, 0 for the rest; ``(w_1, w_2) = 2 softmax(W_0 x)``.

    Args:
        x: A layer's normalised input.
        routed: Weights of the router. None: no routed heads; then w_1 is 1.
        shared: Weights of the shared heads. None: no shared heads; then w_2 is 1.
        split: W_0; not read where one of the two kinds is missing.
        active: K, how many of the E routed heads a token gets.
    """
    kinds = []
    weights = [x.new_ones(*x.shape[:-1], 1)] * 2
    if routed is not None and shared is not None and split is not None:
        weights = list((2 * (x @ split.T).softmax(-1)).split(1, dim=-1))
    if shared is not None:
        kinds.append(weights[0] * len(shared) * (x @ shared.T).softmax(-1))
    if routed is not None:
        p, chosen = _routed(x, routed, active)
        kept = p * chosen
        kinds.append(weights[1] * active * kept / kept.sum(-1, keepdim=True))
    return torch.cat(kinds, dim=-1)


def load_balance(
    x: Float[Tensor, "*B D"], routed: Float[Tensor, "E D"], active: int
) -> Float[Tensor, ""]:
    """The loss that keeps routed heads in use: ``E^2 mean_h(mean p_h * mean [h is active])``."""
    p, chosen = _routed(x, routed, active)
    n = p.shape[-1]
    return (p.flatten(0, -2).mean(0) * chosen.to(p.dtype).flatten(0, -2).mean(0)).mean() * n**2


def _routed(x: Tensor, routed: Tensor, active: int) -> tuple[Tensor, Tensor]:
    """Probabilities of the routed heads, and which are active."""
    p = (x @ routed.T).softmax(-1)
    return p, torch.zeros_like(p).scatter(-1, p.topk(active, dim=-1).indices, 1).bool()


def norm_shares(q: Float[Tensor, "*B E d"]) -> Float[Tensor, "*B E"]:
    """The router without parameters: ``softmax(n / std(n))`` of the norms n of heads' queries.

    Args:
        q: Query projections before rotation, of the heads that are routed. Heads of equal norm
            share alike.
    """
    norms = q.norm(dim=-1)
    return (norms / norms.std(-1, keepdim=True)).nan_to_num(nan=0.0).softmax(-1)


def norm_routed(q: Float[Tensor, "*B H d"]) -> Bool[Tensor, "*B H"]:
    """Heads that MoH-LLaMA3 keeps: the lower half, and of the others the H / 4 of largest shares.

    Args:
        q: Query projections before rotation.

    Raises:
        ValueError: If the number of heads is no multiple of 4.
    """
    heads = q.shape[-2]
    if heads % 4:
        raise ValueError(f"norm_routed: {heads} heads have no quarter; give a multiple of 4.")
    kept = torch.zeros(q.shape[:-1], dtype=torch.bool, device=q.device)
    kept[..., : heads // 2] = True
    largest = norm_shares(q[..., heads // 2 :, :]).topk(heads // 4, dim=-1).indices
    return kept.scatter(-1, largest + heads // 2, True)


def cache_budget(
    scores: Float[Tensor, "N_l H"],
    *,
    kv_heads: int,
    budget: int,
    window: int = 32,
    ratio: float = 0.1,
) -> Int[Tensor, "N_l H_kv"]:
    """How many keys, besides the latest ones, each key-value head may keep (SparseMM).

    ``b = B - w``, ``low = int(b r)``, ``cap = round(s (b - low) N_l H_kv + low)`` with scores s
    that sum to 1, added up within the group of a key-value head.

    Args:
        scores: Visual scores of the query heads, >= 0.
        kv_heads: Key-value heads of a layer.
        budget: Keys per key-value head on average, B.
        window: So many latest keys are always kept, w (code).
        ratio: The part of the rest that every head gets alike, r (scripts).

    Raises:
        ValueError: For a number out of range, or scores that say nothing.
    """
    n_layers, heads = scores.shape
    if kv_heads < 1 or heads % kv_heads:
        raise ValueError(f"cache_budget: {heads} heads do not share {kv_heads} key-value heads.")
    if not 0 <= window < budget:
        raise ValueError(
            f"cache_budget: window must be >= 0 and below the budget {budget}, got {window}."
        )
    if not 0 <= ratio <= 1:
        raise ValueError(f"cache_budget: ratio must be >= 0 and <= 1, got {ratio}.")
    if not bool(scores.isfinite().all()) or bool((scores < 0).any()) or not bool(scores.any()):
        raise ValueError("cache_budget: scores must be >= 0 and not all 0: they say nothing.")
    share = scores.double() / scores.double().sum()
    share = share.unflatten(-1, (kv_heads, -1)).sum(-1)
    rest = budget - window
    low = int(rest * ratio)
    return (share * (rest - low) * n_layers * kv_heads + low).round().long()
