"""The cross-attention blocks of CrossLMM: plain modules, and the attention that they share.

A block has the shape of the language model's own attention (heads, shared key/value heads, biases)
with keys and values made of image states, and a scalar gate in front of what it adds.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy

__all__ = [
    "CrossAttention",
    "CrossBlocks",
    "RMSNorm",
    "Shape",
    "Store",
    "cross_attend",
    "operations",
]

#: Rows of a table of learned frame numbers.
FRAMES = 1024
_FP8 = torch.float8_e4m3fn
_FP8_MAX = torch.finfo(_FP8).max


@dataclass(frozen=True)
class Shape:
    """The shape of a language model's attention.

    Attributes:
        width: Width D' of the residual stream.
        heads: Query heads.
        kv_heads: Key/value heads; divides ``heads``.
        head_dim: Width d of a head.
        bias: Whether queries, keys and values have a bias.
        out_bias: Whether the output projection has one.
    """

    width: int
    heads: int
    kv_heads: int
    head_dim: int
    bias: bool
    out_bias: bool

    @classmethod
    def of(cls, anatomy: Anatomy) -> Shape:
        """The shape of a model's first decoder layer."""
        out: Any = anatomy.o_proj(0)
        query = getattr(anatomy.attention(0), "q_proj", None)
        inner = getattr(out, "in_features", anatomy.width)
        return cls(
            width=anatomy.width,
            heads=anatomy.n_heads,
            kv_heads=anatomy.n_kv_heads,
            head_dim=inner // anatomy.n_heads,
            bias=getattr(query, "bias", None) is not None,
            out_bias=getattr(out, "bias", None) is not None,
        )


def operations(shape: Shape, source: int, originals: int, queries: int) -> dict[str, int]:
    """Floating-point operations of one block in a prompt's first pass, one row.

    A multiplication and an addition count as two.

    Args:
        shape: Of the attention.
        source: Width of the image states.
        originals: How many of them there are.
        queries: How many positions look.

    Returns:
        "keys_values", "queries" (with the output projection), and "attention".
    """
    inner, shared = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    return {
        "keys_values": 2 * originals * source * 2 * shared,
        "queries": 2 * queries * 2 * shape.width * inner,
        "attention": 4 * queries * originals * inner,
    }


class RMSNorm(nn.Module):
    """Root-mean-square norm, computed in fp32.

    Args:
        width: Size of the last dimension.
        eps: Added to the mean square.
    """

    def __init__(self, width: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """``x / sqrt(mean(x^2) + eps) * weight``."""
        y = x.float()
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + self.eps)
        return y.to(x.dtype) * self.weight


def cross_attend(
    q: Float[Tensor, "B H n d"],
    k: Float[Tensor, "R G O d"],
    v: Float[Tensor, "R G O d"],
    keys: Bool[Tensor, "R O"] | None = None,
    rows: Bool[Tensor, "B n O"] | None = None,
) -> Float[Tensor, "B H n d"]:
    """Softmax attention of queries over the originals; rows that see nothing give exact zeros.

    The kernel runs on R batches: rows that share their originals (beams) and heads that share keys
    lie one below the other as queries, so neither keys nor values are ever copied.

    Args:
        q: Queries of B rows, a multiple of R: row r's copies stand together.
        k: Keys of G key/value heads.
        v: Values.
        keys: Which originals count; None: all.
        rows: Which of them each query sees; None: all that count.
    """
    (b, heads, n, d), (r, groups, o, _) = q.shape, k.shape
    if o == 0 or n == 0:
        return torch.zeros_like(q)
    kind = q.dtype
    if kind == torch.float16:  # scores of image states overflow there
        q, k, v = q.float(), k.float(), v.float()
    copies, shared = b // r, heads // groups
    folded = q.view(r, copies, groups, shared, n, d).transpose(1, 2).reshape(r, groups, -1, d)
    mask, seeing = None, None
    if rows is not None:
        seen = rows if keys is None else rows & keys.repeat_interleave(copies, 0)[:, None]
        seeing = seen.any(-1)[:, None, :, None]
        seen = seen | ~seen.any(-1, keepdim=True)  # no row of a softmax may be empty
        seen = seen.view(r, 1, copies, 1, n, o).expand(-1, -1, -1, shared, -1, -1)
        mask = seen.reshape(r, 1, -1, o)
    elif keys is not None:
        seeing = keys.any(-1).repeat_interleave(copies, 0)[:, None, None, None]
        mask = (keys | ~keys.any(-1, keepdim=True))[:, None, None]
    y = functional.scaled_dot_product_attention(folded, k, v, attn_mask=mask)
    y = y.view(r, groups, copies, shared, n, d).transpose(1, 2).reshape(b, heads, n, d)
    return (y if seeing is None else y.masked_fill(~seeing, 0)).to(kind)


class CrossAttention(nn.Module):
    """One gated cross-attention: ``tanh(g) W_o Attention(W_q norm(x), W_k norm(z), W_v norm(z))``.

    Args:
        shape: Of the language model's attention.
        source: Width of the image states.
        eps: Of both norms.
        std: Standard deviation of the fresh projections (default: ``in_features ** -0.5``, so that
            they keep the size of what enters at every width; the usual 0.02 at 2,500).
        gate: First value of the gate, before its tanh.
        frames: Rows of the table of frame numbers; 0: none.
    """

    def __init__(
        self,
        shape: Shape,
        source: int,
        *,
        eps: float,
        gate: float,
        frames: int,
        std: float | None = None,
    ) -> None:
        super().__init__()
        inner, shared = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
        self.heads, self.kv_heads = shape.heads, shape.kv_heads
        self.q_norm = RMSNorm(shape.width, eps)
        self.kv_norm = RMSNorm(source, eps)
        self.q_proj = nn.Linear(shape.width, inner, bias=shape.bias)
        self.k_proj = nn.Linear(source, shared, bias=shape.bias)
        self.v_proj = nn.Linear(source, shared, bias=shape.bias)
        self.o_proj = nn.Linear(inner, shape.width, bias=shape.out_bias)
        for part in (self.q_proj, self.k_proj, self.v_proj, self.o_proj):
            nn.init.normal_(part.weight, std=part.in_features**-0.5 if std is None else std)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
        self.frame = nn.Embedding(frames, source) if frames else None
        if self.frame is not None:
            nn.init.zeros_(self.frame.weight)
        self.gate = nn.Parameter(torch.full((1,), float(gate)))

    def keys_values(
        self, z: Float[Tensor, "R O E"], number: Int[Tensor, "R O"]
    ) -> tuple[Float[Tensor, "R G O d"], Float[Tensor, "R G O d"]]:
        """Keys and values of the originals.

        Args:
            z: Their states.
            number: Number of each one's frame within its picture.
        """
        y = self.kv_norm(z)
        numbered = y if self.frame is None else y + self.frame(number)
        k = self.k_proj(numbered).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        v = self.v_proj(y).unflatten(-1, (self.kv_heads, -1)).transpose(1, 2)
        return k, v

    def forward(
        self,
        x: Float[Tensor, "B n D"],
        k: Float[Tensor, "R G O d"],
        v: Float[Tensor, "R G O d"],
        keys: Bool[Tensor, "R O"] | None = None,
        rows: Bool[Tensor, "B n O"] | None = None,
    ) -> Float[Tensor, "B n D"]:
        """What is added to the residual stream ``x``. See :func:`cross_attend`."""
        q = self.q_proj(self.q_norm(x)).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        y = self.o_proj(cross_attend(q, k, v, keys, rows).transpose(1, 2).flatten(2))
        if rows is not None or keys is not None:  # an output bias must not reach blind rows
            y = y.masked_fill(~_seeing(x, keys, rows), 0)
        return torch.tanh(self.gate.float()).to(y.dtype) * y


def _seeing(x: Tensor, keys: Tensor | None, rows: Tensor | None) -> Bool[Tensor, "B n_or_1 1"]:
    copies = 1 if keys is None else x.shape[0] // keys.shape[0]
    if rows is None:
        assert keys is not None
        return keys.any(-1).repeat_interleave(copies, 0)[:, None, None]
    seen = rows if keys is None else rows & keys.repeat_interleave(copies, 0)[:, None]
    return seen.any(-1)[..., None]


class CrossBlocks(nn.Module):
    """All blocks of a model, by kind and layer.

    Attributes:
        v2v: Blocks whose queries are visual positions; empty if there are none.
        t2v: Blocks whose queries are text positions.
    """

    def __init__(self, v2v: dict[int, CrossAttention], t2v: dict[int, CrossAttention]) -> None:
        super().__init__()
        self.v2v = nn.ModuleDict({str(layer): block for layer, block in v2v.items()})
        self.t2v = nn.ModuleDict({str(layer): block for layer, block in t2v.items()})


class Store:
    """Keys and values of one layer, kept for the tokens to come.

    Args:
        kind: "full": as they are. "fp8": in 8 bits, one scale per row and head. "pooled": means
            over ``groups``.
        k: Keys [R, G, O, d].
        v: Values.
        keys: Which originals count, bool [R, O].
        groups: int64 [R, O]; for "pooled", the group of each original, from 0 on.
    """

    def __init__(
        self, kind: str, k: Tensor, v: Tensor, keys: Tensor, groups: Tensor | None = None
    ) -> None:
        self.kind, self.dtype, self.keys = kind, k.dtype, keys
        if kind == "pooled" and groups is not None:
            k, self.keys = _means(k, keys, groups)
            v, _ = _means(v, keys, groups)
        self._k, self._k_scale = _packed(k) if kind == "fp8" else (k, None)
        self._v, self._v_scale = _packed(v) if kind == "fp8" else (v, None)

    @cached_property
    def whole(self) -> bool:
        """Whether all of ``keys`` count; asked in every later pass, found out once."""
        return bool(self.keys.all())

    @property
    def bytes(self) -> int:
        """Memory of keys and values, in bytes."""
        return sum(x.numel() * x.element_size() for x in (self._k, self._v))

    def get(self) -> tuple[Tensor, Tensor]:
        """Keys and values in the precision in which they came."""
        return (
            _unpacked(self._k, self._k_scale, self.dtype),
            _unpacked(self._v, self._v_scale, self.dtype),
        )


def _packed(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax((-2, -1), keepdim=True).clamp(min=1e-12) / _FP8_MAX
    return (x.float() / scale).to(_FP8), scale


def _unpacked(x: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    return x if scale is None else (x.float() * scale).to(dtype)


def _means(x: Tensor, keys: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
    """Means of the originals of each group that count, and which groups have any."""
    count = int(groups.max()) + 1
    size = torch.zeros(keys.shape[0], count, device=x.device)
    size = size.scatter_add(1, groups, keys.float())
    index = groups[:, None, :, None].expand_as(x)
    sums = torch.zeros(*x.shape[:2], count, x.shape[3], device=x.device)
    sums = sums.scatter_add(2, index, x.float() * keys[:, None, :, None])
    means = sums / size.clamp(min=1)[:, None, :, None]
    return means.to(x.dtype), size > 0
