"""What methods open in masks, for flash kernels, which take no mask: attention in two parts.

    part 1   every query, causal, by the kernel as always                  output O1, log-sum-exp l1
    part 2   the queries that see more, without a mask, over what is opened for them         O2, l2
    l = log(exp l1 + exp l2)       O = O1 exp(l1 - l) + O2 exp(l2 - l)

The two sets of keys are disjoint, so that is one softmax over both. Backward, each part's kernel is
called with the merged O and l (as in ring attention, arXiv 2310.01889): then its weights are the
merged ones, and the gradients add up. The extra work is queries times opened keys, and no matrix of
all positions is ever made.

A pass's :class:`Plan` travels as the decoder's attention mask, an input like any other: whatever a
training recomputes gets the plan of its own forward pass.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import accumulate, count
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.engine.masks.flash_kernels import Cuts, Kernel, kernel_for
from mmlm.errors import UnsupportedAttention

__all__ = ["Plan", "attend", "checked_kernel", "handed_over", "intercept", "plan_of"]

#: Most numbers in one chunk of queries times keys while a plan is made.
_CHUNK = 1 << 22
_KEPT = 32
_NUMBERS = count(1)
_PLANS: OrderedDict[int, Plan] = OrderedDict()


@dataclass(frozen=True, eq=False)
class Plan:
    """Who sees whom in one pass over a batch [B, N]. Indices count positions row by row.

    Attributes:
        own: int64 [T]; all real positions, document after document.
        documents: Bounds of the documents in ``own``.
        asks: int64 [A]; queries that see more than what stands before them, each once.
        told: int64 [S]; the keys that are opened, for one group of queries after the other.
        groups: Bounds of the groups in ``asks`` and in ``told``.
    """

    own: Tensor
    documents: tuple[int, ...]
    asks: Tensor
    told: Tensor
    groups: tuple[tuple[int, ...], tuple[int, ...]]


def plan_of(
    opens: Callable[[int, Tensor, Tensor], Tensor], rows: int, documents: Tensor
) -> Plan | None:
    """The plan of a pass.

    Args:
        opens: ``(row, q [c, 1], k [1, N]) -> bool [c, N]``: what is opened.
        rows: Rows that it knows; auxiliary rows below them are causal.
        documents: int [B, N]; the document of each position, -1 on padding.

    Returns:
        None if nothing is opened beyond causal.
    """
    n, device = documents.shape[1], documents.device
    k = torch.arange(n, device=device)[None]
    step = max(1, _CHUNK // n)
    asks, told = [], []
    for row in range(rows):
        for first in range(0, n, step):
            q = torch.arange(first, min(first + step, n), device=device)[:, None]
            more = opens(row, q, k) & (k > q)
            for start, stop in _runs(more):
                asks.append(row * n + first + torch.arange(start, stop, device=device))
                told.append(row * n + more[start].nonzero()[:, 0])
    if not asks:
        return None
    places = [
        row * n + (documents[row] == document).nonzero()[:, 0]
        for row in range(len(documents))
        for document in documents[row].unique().tolist()
        if document >= 0
    ]
    groups = (_bounds(map(len, asks)), _bounds(map(len, told)))
    documents_at = _bounds(map(len, places))
    return Plan(torch.cat(places), documents_at, torch.cat(asks), torch.cat(told), groups)


def _runs(more: Tensor) -> list[tuple[int, int]]:
    """Stretches of queries that see the same further keys, those that see none left out."""
    new = torch.ones(len(more), dtype=torch.bool, device=more.device)
    new[1:] = (more[1:] != more[:-1]).any(1)
    starts = new.nonzero()[:, 0].tolist()
    some = more.any(1).tolist()
    return [(a, b) for a, b in zip(starts, [*starts[1:], len(more)], strict=True) if some[a]]


def _bounds(lengths: Iterable[int]) -> tuple[int, ...]:
    return tuple(accumulate(lengths, initial=0))


# ---- a plan's way to the attention function ------------------------------------------------------


def handed_over(plan: Plan) -> Tensor:
    """What stands for a plan as the decoder's 4-D mask: its number, [1, 1, 1, 1] on the CPU."""
    number = next(_NUMBERS)
    _PLANS[number] = plan
    while len(_PLANS) > _KEPT:
        _PLANS.popitem(last=False)
    return torch.tensor([[[[number]]]])


def intercept(name: str) -> None:
    """Lets the attention function of a name take plans; for all other masks it stays what it is.

    The table of functions is the library's and global, what is put there holds no state.

    Raises:
        UnsupportedAttention: If the table has no such function.
    """
    if name not in ALL_ATTENTION_FUNCTIONS:
        raise UnsupportedAttention(
            f"Attention {name!r} is in no table of functions, so nothing can be added to it.",
            advice="Set sdpa, eager or flex_attention.",
        )
    function = ALL_ATTENTION_FUNCTIONS[name]
    if not isinstance(function, _Intercepted):
        AttentionInterface.register(name, _Intercepted(function))


class _Intercepted:
    """An attention function that takes plans too."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function = function

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor | None]:
        mask = attention_mask
        if mask is None or mask.ndim != 4:
            return self.function(module, query, key, value, mask, **kwargs)
        plan = _PLANS.get(int(mask)) if mask.numel() == 1 else None
        if plan is None:
            raise UnsupportedAttention(
                "A flash kernel was given a 4-D mask, which it cannot take.",
                advice="Set sdpa or eager for masks of your own.",
            )
        return attend(plan, query, key, value, **kwargs), None


def attend(
    plan: Plan,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> Tensor:
    """Attention of one layer under a plan.

    Args:
        plan: Of this pass.
        query: [B, H, N, d].
        key: [B, H_kv, N, d].
        value: Like ``key``.
        scaling: Of the scores; None for 1 / sqrt(d).
        dropout: Must be 0.
        sliding_window: How many positions a query sees, its own included. It bounds the causal
            part; what is opened lies ahead.
        softcap: Must be None.
        s_aux: Must be None.

    Returns:
        [B, N, H, d].

    Raises:
        UnsupportedAttention: If the layer asks for what cannot be split.
    """
    asked = {"dropout": dropout, "softcap": softcap, "attention sinks": s_aux is not None}
    if wrong := [name for name, value in asked.items() if value]:
        raise UnsupportedAttention(
            f"Attention in two parts cannot be exact with {', '.join(wrong)}.",
            advice="Set sdpa or eager, or switch it off (attention_dropout=0).",
        )
    if key.shape[2] != query.shape[2]:
        raise UnsupportedAttention(
            f"A prompt of {query.shape[2]} positions meets a cache of {key.shape[2]}: flash "
            "kernels take caches that grow.",
            advice="Leave cache_implementation out, or set sdpa.",
        )
    query, key, value = _half(query, key, value)
    kernel = checked_kernel(query.device, query.dtype, query.shape[-1])
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _Split.apply(query, key, value, plan, kernel, scale, sliding_window)


def _half(*heads: Tensor) -> tuple[Tensor, ...]:
    """On CUDA, in the precision that autocast asks for: flash kernels know no float32 there."""
    kind = heads[0].device.type
    if kind != "cuda" or heads[0].dtype != torch.float32:
        return heads
    if not torch.is_autocast_enabled(kind):
        raise UnsupportedAttention(
            "Flash kernels compute in float16 or bfloat16 on CUDA, and the model is float32.",
            advice="Load it with dtype=torch.bfloat16, or set sdpa.",
        )
    return tuple(x.to(torch.get_autocast_dtype(kind)) for x in heads)


class _Split(torch.autograd.Function):
    """The two parts, merged."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        plan: Plan,
        kernel: Kernel,
        scale: float,
        window: int | None,
    ) -> Tensor:
        q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))  # [B * N, H, d]
        causal = Cuts(plan.documents, plan.documents, True, window)
        ahead = Cuts(*plan.groups, False)
        o1, l1 = kernel.forward(q[plan.own], k[plan.own], v[plan.own], causal, scale)
        out, l = torch.zeros_like(q), l1.new_zeros(q.shape[:2])
        out[plan.own], l[plan.own] = o1, l1
        o2, l2 = kernel.forward(q[plan.asks], k[plan.told], v[plan.told], ahead, scale)
        first = l[plan.asks]
        merged = torch.logaddexp(first, l2)
        shares = ((first - merged).exp()[..., None], (l2 - merged).exp()[..., None])
        both = out[plan.asks] * shares[0] + o2 * shares[1]
        out[plan.asks], l[plan.asks] = both.to(out.dtype), merged
        ctx.save_for_backward(q, k, v, out, l)
        ctx.rest = (plan, kernel, scale, causal, ahead, query.shape)
        rows, heads, n, width = query.shape
        return out.view(rows, n, heads, width)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out, l = ctx.saved_tensors
        plan, kernel, scale, causal, ahead, (rows, _, n, _) = ctx.rest
        grad = grads[0].reshape(out.shape)
        given = (torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v))
        for asks, told, cuts in ((plan.own, plan.own, causal), (plan.asks, plan.told, ahead)):
            parts = kernel.backward(
                grad[asks], q[asks], k[told], v[told], out[asks], l[asks], cuts, scale
            )
            for whole, part, index in zip(given, parts, (asks, told, told), strict=True):
                whole.index_add_(0, index, part.to(whole.dtype))  # a key may be told to several
        back = (x.unflatten(0, (rows, n)).transpose(1, 2) for x in given)
        return (*back, None, None, None, None)


# ---- is the kernel what it seems to be? ----------------------------------------------------------

_CHECKED: set[tuple[str, torch.dtype, int]] = set()


def checked_kernel(device: torch.device, dtype: torch.dtype, width: int) -> Kernel:
    """The flash kernel of a device, compared with a plain softmax when it is first asked for.

    Args:
        device: Where the heads are.
        dtype: Of the heads.
        width: Numbers per head.

    Raises:
        UnsupportedAttention: If there is none that gives its log-sum-exp, or it gives others.
    """
    kernel = kernel_for(device)
    if kernel is None:
        raise UnsupportedAttention(
            f"Torch has no flash kernel on {device.type!r} that gives its log-sum-exp, without "
            "which attention cannot be put together from two parts.",
            advice="Set sdpa, eager or flex_attention.",
        )
    key = (str(device), dtype, width)
    if key not in _CHECKED:
        _compare(kernel, device, dtype, width)
        _CHECKED.add(key)
    return kernel


@torch.no_grad()
def _compare(kernel: Kernel, device: torch.device, dtype: torch.dtype, width: int) -> None:
    """One small problem, both ways: three keys are opened for two of nine queries."""
    draw = torch.Generator().manual_seed(0)
    heads = [torch.randn(1, 2, 9, width, generator=draw).to(device, dtype) for _ in range(4)]
    index = torch.arange(9, device=device)
    told, asks = index[5:8], index[1:3]
    plan = Plan(index, (0, 9), asks, told, ((0, 2), (0, 3)))
    seen = index[:, None] >= index[None]
    seen[1:3, 5:8] = True

    def both(function: Callable[..., Tensor]) -> list[Tensor]:
        with torch.enable_grad():
            leaves = [x.detach().clone().requires_grad_() for x in heads[:3]]
            y = function(*leaves)
            grads = torch.autograd.grad(y, leaves, heads[3].transpose(1, 2).to(y.dtype))
        return [x.float() for x in (y, *grads)]

    def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        s = (q.double() @ k.double().mT) * width**-0.5
        a = s.masked_fill(~seen, -torch.inf).softmax(-1) @ v.double()
        return a.transpose(1, 2)

    found = both(lambda q, k, v: _Split.apply(q, k, v, plan, kernel, width**-0.5, None))
    limit = 1e-4 if torch.finfo(dtype).eps < 1e-5 else 0.1
    for mine, right in zip(found, both(plain), strict=True):
        if not bool((mine - right).abs().max() <= limit):
            raise UnsupportedAttention(
                f"Torch's flash kernel on {device.type!r} gives other numbers than a plain softmax "
                "when its log-sum-exp is used.",
                advice="Set sdpa, eager or flex_attention.",
            )
