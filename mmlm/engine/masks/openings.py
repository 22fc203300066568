"""The ``mask`` site: attention that a method opens beyond causal.

A method returns a rule ``(b, q, k) -> bool`` on positions of the sequence; the union of all rules
is OR-ed to what the model would see by itself. That is built by the library's own functions, so
windows, packed rows, static caches and families with bidirectional images stay as they are, and is
handed to the decoder as a ready 4-D mask, or one per kind of layer; for flex kernels as a mask of
blocks, for flash kernels, which take none, as a plan of attention in two parts
(:mod:`mmlm.engine.masks.split_attention`). Padding stays closed, a window bounds what a rule opens
as it bounds everything else, and documents of a packed row stay apart.

(The library's own argument for further rules, ``or_mask_function``, is of no use here: in packed
rows it is asked about positions in the document instead of the row, and it escapes windows.)

Only passes over several positions are changed: the query of a decoding step is the newest position
and sees everything before it anyway. For gradients and checkpointing the mask is an input.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.layout import TokenLayout
from mmlm.engine.masks.base_masks import written_out
from mmlm.engine.masks.flex import block_mask
from mmlm.engine.masks.kinds import (
    BLOCKS,
    DENSE,
    SPLIT,
    first_layer,
    kind_of_mask,
    kinds,
    reasons_against_masks,
    window,
)
from mmlm.engine.masks.split_attention import checked_kernel, handed_over, intercept, plan_of
from mmlm.engine.removal.columns import open_mask
from mmlm.errors import IncompatibleMethods, LayoutError, UnsupportedAttention

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["Openings", "Rule", "install_masks", "opened", "opened_at"]

#: Rows, queries and keys, broadcastable against each other, to what is opened.
Rule: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]


def install_masks(session: Session, stack: ExitStack) -> None:
    """Hooks the decoder's entrance if a method opens attention.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    users = session.users("mask")
    if users:
        _refuse(session, users)
        session.openings = Openings(session, users)
        text, hook = session.anatomy.text, session.openings.on_text
        stack.callback(text.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _refuse(session: Session, users: list[int]) -> None:
    """Refuses kernels that cannot be told, and methods that would read what they were not told."""
    config = session.anatomy.text.config
    how, implementation = kind_of_mask(config), config._attn_implementation or "eager"
    opening = " + ".join(session.methods[i].label for i in users)
    if how == DENSE:
        return
    for site in ("tokens", "keys", "scores", "weights"):
        for i in session.users(site):
            raise IncompatibleMethods(
                f"{session.methods[i].label} acts at {site!r} and needs the mask itself, which "
                f"{opening} cannot hand over with attention {implementation!r}.",
                advice="Set sdpa or eager.",
            )
    if how == SPLIT:
        if session.anatomy.family.types:
            raise UnsupportedAttention(
                f"{opening}: attention {implementation!r} takes no mask, so the pictures of "
                f"{session.anatomy.family_name}, which see themselves both ways, would silently "
                "stay causal.",
                advice="Set sdpa, eager or flex_attention.",
            )
        weight = session.anatomy.head.weight
        try:
            checked_kernel(weight.device, weight.dtype, 16) if _computes(weight) else None
        except UnsupportedAttention as error:
            raise UnsupportedAttention(
                f"{opening}: attention {implementation!r} takes no mask and would silently stay "
                f"causal. {error}",
                advice="Set sdpa or flex_attention.",
            ) from error


def _computes(weight: Tensor) -> bool:
    """Whether a kernel can be tried now: float32 on CUDA may still be computed in half."""
    return weight.device.type != "cuda" or weight.dtype != torch.float32


class Openings:
    """What methods open in the running prompt.

    Args:
        session: The attachment.
        users: Numbers of the methods with a rule.
    """

    def __init__(self, session: Session, users: list[int]) -> None:
        self.session = session
        self.users = users
        self._history: TokenLayout | None = None
        self._now: tuple[list[Rule], TokenLayout | None] = ([], None)

    def now(self) -> tuple[list[Rule], TokenLayout | None]:
        """The rules of the running pass, and the roles that they are about."""
        return self._now

    def on_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook of the text decoder: puts the ready mask in."""
        new = kwargs["inputs_embeds"].shape[1]
        self._now = ([], None)
        if new == 1:
            return None
        past = 0 if self.session.quiet else self.session.past
        layout = self._layout(past, new)
        rules = [] if layout is None else self.rules(layout)
        if layout is None or not rules:
            return None
        config, cache = module.config, kwargs.get("past_key_values")
        names = " + ".join(self.session.methods[i].label for i in self.users)
        if reasons := reasons_against_masks(config):
            raise LayoutError(f"{names}: {'; '.join(reasons)}.", advice="Set sdpa or eager again.")
        if past and not self.session.generating:
            _refuse_stale(names, rules, layout, past)
        self._now = (rules, layout)
        how = kind_of_mask(config)
        if how == SPLIT:
            return self._split(args, kwargs, config, past)

        def edit(kind: str, base: Any) -> Any:
            sizes = (
                (0, 0) if cache is None else cache.get_mask_sizes(new, first_layer(config, kind))
            )
            bound, starts = window(config, kind), (past, sizes[1])
            if how == BLOCKS:
                return self._blocks(base, starts, bound)
            return self._opened(base, rules, layout, starts, bound)

        ready = written_out(config, kwargs)
        if isinstance(ready, dict):
            ready = {kind: edit(kind, base) for kind, base in ready.items()}
        else:
            ready = edit(kinds(config)[0], ready)
        return args, {**kwargs, "attention_mask": ready}

    def _blocks(self, base: Any, starts: tuple[int, int], bound: int | None) -> Any:
        """A mask of blocks with what the running pass opens."""
        rules, layout = self._now
        if layout is None:
            return base

        def more(b: Tensor, q: Tensor, k: Tensor) -> Tensor:
            main = b.clamp(max=layout.rows - 1)
            where = opened_at(rules, layout, main, q + starts[0], k + starts[1], bound)
            return where & (b < layout.rows)

        return block_mask(base, more)

    def _split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], config: Any, past: int
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Hands the plan of the running pass over in the place of its mask."""
        rules, layout = self._now
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        if layout is None:
            return None
        given = next(iter(mask.values())) if isinstance(mask, dict) else mask
        if given is not None and given.ndim != 2:
            raise UnsupportedAttention(
                "A flash kernel was given a 4-D mask, which it cannot take.",
                advice="Set sdpa or eager for masks of your own.",
            )
        length = past + embeds.shape[1]
        documents = layout.doc.new_zeros(embeds.shape[0], length)
        documents[: layout.rows] = layout.doc
        if given is not None:
            documents = documents.masked_fill(given[:, :length] == 0, -1)

        def opens(row: int, q: Tensor, k: Tensor) -> Tensor:
            b = torch.full_like(q, row)
            return opened_at(rules, layout, b, q, k, None) & (q >= past)

        plan = plan_of(opens, layout.rows, documents)
        if plan is None:
            return None
        if past:
            raise UnsupportedAttention(
                "A later turn opens attention on a kept cache, for which flash kernels are not set "
                "up here.",
                advice="Set sdpa, or pass the whole conversation as one prompt.",
            )
        intercept(config._attn_implementation)
        ready: Any = handed_over(plan)
        names = list(mask) if isinstance(mask, dict) else kinds(config)
        if isinstance(mask, dict) or len(names) > 1:
            ready = dict.fromkeys(names, ready)
        return args, {**kwargs, "attention_mask": ready}

    def rules(self, layout: TokenLayout) -> list[Rule]:
        """The methods' rules for a prompt; a method that opens nothing has none."""
        methods, states = self.session.methods, self.session.states
        found = (methods[i].mask(states[i], layout) for i in self.users)
        return [rule for rule in found if rule is not None]

    def _opened(
        self,
        base: Tensor,
        rules: list[Rule],
        layout: TokenLayout,
        starts: tuple[int, int],
        bound: int | None,
    ) -> Tensor:
        new, width = base.shape[-2:]
        device = base.device
        q = torch.arange(starts[0], starts[0] + new, device=device)[None, :, None]
        k = torch.arange(starts[1], starts[1] + width, device=device)[None, None]
        where = opened(rules, layout, q, k, bound)[:, None]
        # Auxiliary rows that ride in this pass lie below the main ones.
        more = base.shape[0] - where.shape[0]
        if more > 0 and base.shape[0] > 1:
            where = functional.pad(where, (0, 0, 0, 0, 0, 0, 0, more))
        return open_mask(base, where)

    def _layout(self, past: int, new: int) -> TokenLayout | None:
        """Roles of all positions up to the end of this pass."""
        session = self.session
        if session.quiet:
            return session.branch_layout
        if past == 0:
            self._history = session.layout
            return self._history
        history = self._history
        if history is None:
            raise LayoutError("No prompt is running.", advice="Start with the whole prompt.")
        if past > history.length:
            history = history.append(past - history.length)
        if history.length < past + new:
            history = history.join(session.roles_of_new(new))
        self._history = history
        return history


def opened(
    rules: list[Rule],
    layout: TokenLayout,
    q: Int[Tensor, "b L 1"],
    k: Int[Tensor, "b 1 K"],
    bound: int | None,
) -> Bool[Tensor, "B L K"]:
    """What the rules open for queries ``q`` and keys ``k``, positions of the sequence.

    Args:
        rules: The methods' rules; the union counts.
        layout: Roles of the positions. Keys behind its end, and negative ones, stay closed.
        q: One row for all, or one per row of the layout.
        k: Likewise.
        bound: How far back a query sees.
    """
    return opened_at(
        rules, layout, torch.arange(layout.rows, device=q.device)[:, None, None], q, k, bound
    )


def opened_at(
    rules: list[Rule], layout: TokenLayout, b: Tensor, q: Tensor, k: Tensor, bound: int | None
) -> Tensor:
    """As :func:`opened`, for rows, queries and keys that broadcast against each other."""
    known = (k >= 0) & (k < layout.length)
    inside, asks = k.clamp(0, layout.length - 1), q.clamp(0, layout.length - 1)
    where = rules[0](b, asks, inside)
    for rule in rules[1:]:
        where = where | rule(b, asks, inside)
    where = where & known & layout.real[b, inside] & (layout.doc[b, asks] == layout.doc[b, inside])
    return where if bound is None else where & (k > q - bound)


def _refuse_stale(names: str, rules: list[Rule], layout: TokenLayout, past: int) -> None:
    """Refuses to open new positions to old queries, whose states are in the cache already."""
    device = layout.seg.device
    q = torch.arange(past, device=device)[None, :, None]
    k = torch.arange(past, layout.length, device=device)[None, None]
    where = opened(rules, layout, q, k, None)
    if bool(where.any()):
        first = int(where.any(-1).nonzero()[:, 1].min())
        raise LayoutError(
            f"{names}: position {first} of the cache would see this turn, so what the cache holds "
            "from there on is stale.",
            advice=f"Crop it by {past - first} positions and pass everything behind them again.",
        )
