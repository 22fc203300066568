"""Torch's own flash kernels, which give the log-sum-exp of every row and take it back.

Attention over one set of keys can be put together from attention over parts of it only if each part
says how much weight it had: l = log sum_j exp(s_j). The public functions keep that number to
themselves; the operators below them do not. On CUDA they are the kernels of FlashAttention-2 that
torch ships, on a CPU its blocked kernel. Neither makes a matrix of queries times keys.

Rows are packed: ``q`` [T, H, d], ``k`` and ``v`` [S, H_kv, d], cut into pieces by ``cut_q`` and
``cut_k`` (0 = first, ..., T or S = last); piece n of the queries sees piece n of the keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["Cuts", "Kernel", "kernel_for"]

_aten: Any = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Cuts:
    """Pieces of packed rows.

    Attributes:
        q: Bounds of the pieces of queries, one more than there are pieces.
        k: Likewise of keys.
        causal: Whether key j of a piece is seen by its queries from the j-th on only. Both pieces
            are of one length then.
        window: How many keys back a query of a causal piece sees, its own included; None: all.
    """

    q: tuple[int, ...]
    k: tuple[int, ...]
    causal: bool
    window: int | None = None


class Kernel(Protocol):
    """Attention with its log-sum-exp, forward and backward."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Output [T, H, d] and l, fp32 or wider [T, H]."""

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        l: Tensor,
        cuts: Cuts,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of q, k and v for weights ``exp(s - l)``.

        ``out`` and ``l`` may be those of a larger set of keys, of which these are a part: then the
        gradients are the part's share.
        """


def kernel_for(device: torch.device) -> Kernel | None:
    """The kernel of a device, None if torch has none that gives its log-sum-exp."""
    if device.type == "cpu":
        return _Cpu()
    if device.type == "cuda" and torch.backends.cuda.is_flash_attention_available():
        return _Cuda()
    return None


class _Cpu:
    """One call per piece."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, scale: float
    ) -> tuple[Tensor, Tensor]:
        out, l = torch.empty_like(q), q.new_empty(q.shape[:2], dtype=_wide(q))
        for a, b, c, d in _pieces(cuts):
            y, own = _aten._scaled_dot_product_flash_attention_for_cpu(
                *_heads_first(q[a:b], k[c:d], v[c:d]), 0.0, cuts.causal and cuts.window is None,
                attn_mask=_band(cuts, b - a, q), scale=scale,
            )  # fmt: skip
            out[a:b], l[a:b] = y[0].transpose(0, 1), own[0].transpose(0, 1)
        return out, l

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        l: Tensor,
        cuts: Cuts,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        given = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        for a, b, c, d in _pieces(cuts):
            heads = _heads_first(q[a:b], k[c:d], v[c:d])
            y, g = (x[a:b].transpose(0, 1)[None].contiguous() for x in (out, grad))
            own = l[a:b].transpose(0, 1)[None].contiguous()
            parts = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
                g, *heads, y, own, 0.0, cuts.causal and cuts.window is None,
                attn_mask=_band(cuts, b - a, q), scale=scale,
            )  # fmt: skip
            for whole, part, (first, last) in zip(
                given, parts, ((a, b), (c, d), (c, d)), strict=True
            ):
                # A key head that several query heads share gets the sum of their gradients.
                shared = part[0].unflatten(0, (whole.shape[1], -1)).sum(1)
                whole[first:last] = shared.transpose(0, 1)
        return given


class _Cuda:
    """All pieces in one call. Half precision only, heads of at most 256 numbers."""

    def forward(
        self, q: Tensor, k: Tensor, v: Tensor, cuts: Cuts, scale: float
    ) -> tuple[Tensor, Tensor]:
        cut_q, cut_k, longest_q, longest_k = _bounds(cuts, q.device)
        out, l, *_ = _aten._flash_attention_forward(
            *map(_wide_heads, (q, k, v)), cut_q, cut_k, longest_q, longest_k, 0.0, cuts.causal,
            False, scale=scale, **_sides(cuts),
        )  # fmt: skip
        return out[..., : q.shape[-1]], l.transpose(0, 1)

    def backward(
        self,
        grad: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        l: Tensor,
        cuts: Cuts,
        scale: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        cut_q, cut_k, longest_q, longest_k = _bounds(cuts, q.device)
        unused = torch.empty(0, dtype=torch.int64, device=q.device)  # of dropout, which is off
        g, *heads, y = map(_wide_heads, (grad, q, k, v, out))
        parts = _aten._flash_attention_backward(
            g, *heads, y, l.transpose(0, 1).contiguous(), cut_q, cut_k, longest_q, longest_k, 0.0,
            cuts.causal, unused, unused, scale=scale, **_sides(cuts),
        )  # fmt: skip
        dq, dk, dv = (x[..., : q.shape[-1]] for x in parts)
        return dq, dk, dv


def _pieces(cuts: Cuts) -> list[tuple[int, int, int, int]]:
    return [
        (a, b, c, d)
        for a, b, c, d in zip(cuts.q[:-1], cuts.q[1:], cuts.k[:-1], cuts.k[1:], strict=True)
        if b > a and d > c
    ]


def _heads_first(q: Tensor, k: Tensor, v: Tensor) -> list[Tensor]:
    """[1, H, n, d] each; keys and values once per query head."""
    groups = q.shape[1] // k.shape[1]
    both = (x.repeat_interleave(groups, dim=1) if groups > 1 else x for x in (k, v))
    return [x.transpose(0, 1)[None].contiguous() for x in (q, *both)]


def _band(cuts: Cuts, n: int, q: Tensor) -> Tensor | None:
    """The mask of a window, as the CPU's kernel takes it."""
    if cuts.window is None:
        return None
    index = torch.arange(n, device=q.device)
    back = index[:, None] - index[None]
    seen = (back >= 0) & (back < cuts.window)
    return torch.zeros(n, n, dtype=q.dtype, device=q.device).masked_fill(~seen, -torch.inf)


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _wide_heads(x: Tensor) -> Tensor:
    """Heads filled up with zeros to a multiple of 8 numbers."""
    return functional.pad(x, (0, -x.shape[-1] % 8)).contiguous()


def _bounds(cuts: Cuts, device: torch.device) -> tuple[Tensor, Tensor, int, int]:
    def longest(bounds: tuple[int, ...]) -> int:
        return max(b - a for a, b in pairwise(bounds))

    both = (torch.tensor(x, dtype=torch.int32, device=device) for x in (cuts.q, cuts.k))
    q, k = both
    return q, k, longest(cuts.q), longest(cuts.k)


def _sides(cuts: Cuts) -> dict[str, int]:
    return {} if cuts.window is None else {"window_size_left": cuts.window - 1}
