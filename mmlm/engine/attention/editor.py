"""The registered attention function: recomputes only the rows that somebody asked for.

While a method acts on attention, the text decoder's implementation is ``mmlm_rows_<base>``: the
model's own kernel runs for all rows, then the rows that methods asked for are computed a second
time in plain torch, in chunks, edited, and written over the kernel's output where they changed.
Everywhere else that output stays, bit for bit. No N x N tensor is ever made, whatever the kernel.
Where nothing but gains on keys acts in a layer, no row is computed a second time: the kernel itself
runs on scaled keys (:mod:`mmlm.engine.attention.scaled_keys`).

The mask function is registered under the same name. Without it the library would build no mask at
all and say nothing: causality and padding would be lost.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from mmlm.engine.attention.rows import AttentionRows, Call, RowsOfWhatIsLeft
from mmlm.engine.attention.scaled_keys import PerHead, on_scaled_keys
from mmlm.engine.combine import chain, product, total
from mmlm.errors import UnsupportedModel

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["ROW_SITES", "RowEditor", "install_rows"]

#: Sites whose edits this module applies.
ROW_SITES = ("keys", "scores", "weights")
#: Those that need rows of scores.
_ON_ROWS = frozenset({"scores", "weights"})

_PREFIX = "mmlm_rows_"
_EDITOR = "_mmlm_rows"
#: Most numbers in one chunk of scores. A chunk's rows times its columns stay below it, so the peak
#: grows with the prompt's length only through what the model itself keeps.
_CHUNK = 1 << 22


def install_rows(session: Session, stack: ExitStack) -> None:
    """Gives the layers somebody acts in an editor and switches the decoder's implementation.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    anatomy = session.anatomy
    editors = {}
    for layer in range(anatomy.n_layers):
        users = sorted({i for site in ROW_SITES for i in session.users(site, layer)})
        if users:
            editors[layer] = RowEditor(session, layer, users)
    if not editors:
        return
    configs: dict[int, Any] = {id(anatomy.text.config): anatomy.text.config}
    for layer in range(anatomy.n_layers):
        module = anatomy.attention(layer)
        if not hasattr(module, "config"):
            raise UnsupportedModel(
                f"{type(module).__name__} has no configuration to choose its attention by.",
                advice="Methods on attention rows cannot run on this model.",
            )
        configs[id(module.config)] = module.config
        if layer in editors:
            setattr(module, _EDITOR, editors[layer])
            stack.callback(delattr, module, _EDITOR)
    bases: dict[int, str] = {}

    def put_in(*_: Any) -> None:
        """Also before every pass: the user may have chosen another implementation since."""
        for key, config in configs.items():
            now = config._attn_implementation or "eager"
            if not now.startswith(_PREFIX):
                bases[key] = now
                # The internal name: the public setter would reach into sub-configurations.
                config._attn_implementation_internal = _registered(now)

    def take_out() -> None:
        for key, config in configs.items():
            config._attn_implementation_internal = bases.get(key, config._attn_implementation)

    put_in()
    stack.callback(take_out)
    stack.callback(anatomy.composite.register_forward_pre_hook(put_in).remove)


def _registered(base: str) -> str:
    """The name under which the function around the kernel ``base`` is registered."""
    name = base if base.startswith(_PREFIX) else _PREFIX + base
    if name not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(name, partial(_attention, base))
        if base in ALL_MASK_ATTENTION_FUNCTIONS:
            AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _attention(
    base: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """The model's own kernel, then the editor of this layer, if there is one."""
    kernel: Callable[..., Any] = (
        # Every modelling file has its own eager function; the table holds the others.
        sys.modules[type(module).__module__].eager_attention_forward
        if base == "eager"
        else ALL_ATTENTION_FUNCTIONS[base]
    )
    editor: RowEditor | None = getattr(module, _EDITOR, None)
    call = Call(query, key, value, attention_mask, kwargs)

    def run(call: Call) -> tuple[Tensor, Tensor | None]:
        asking = PerHead(module) if call.apart else module
        return kernel(asking, call.query, call.key, call.value, call.mask, **kwargs)

    return run(call) if editor is None else editor.edit(call, run)


Kernel: TypeAlias = Callable[[Call], tuple[Tensor, Tensor | None]]


#: fp32 [B, H, R, K], and where gains and deltas changed something, if there were any.
_Weights: TypeAlias = tuple[Tensor, Tensor | None]


class RowEditor:
    """Edits the attention rows of one layer. Hangs on the layer's attention module.

    Args:
        session: The attachment.
        layer: Number of the layer.
        users: Numbers of the methods that act at a row site in this layer, in the user's order.
            Those that only look are asked last.
    """

    def __init__(self, session: Session, layer: int, users: list[int]) -> None:
        self.session = session
        self.layer = layer
        # Whoever only looks sees what the model will use.
        self.users = sorted(users, key=lambda i: "weights" in session.methods[i].only_looks)
        self.surveyors = [i for i in users if session.wanted.surveys(i)]

    def edit(self, call: Call, kernel: Kernel) -> tuple[Tensor, Tensor | None]:
        """The attention's output [rows, L, H, d] with edited rows in place.

        Attention weights, which eager kernels return, get the edited rows too: whoever asks for
        the attention sees what the model used.
        """
        session, layer = self.session, self.layer
        if session.quiet:
            return kernel(call)
        acting = [i for i in self.users if session.methods[i].acts_now(session.states[i], layer)]
        if not acting:
            return kernel(call)
        if all(session.methods[i].sites.isdisjoint(_ON_ROWS) for i in acting):
            past, length = session.past, session.layout.length  # of which some may be gone
            gain = self._gain(acting, past + call.query.shape[2] if past else length)
            return on_scaled_keys(session, layer, call, gain, kernel)
        if session.pruning is not None and (lacking := session.pruning.lacking(layer)) is not None:
            self._look(RowsOfWhatIsLeft(call, session.rows, session.past, *lacking), acting)
            return kernel(call)
        rows = AttentionRows(call, session.rows, session.past)
        session.attending = rows
        try:
            if self._replaces_all(call, acting):
                return self._replaced(rows, call, kernel, acting), None
            return self._edit(rows, *kernel(call), acting)
        finally:
            session.attending = None

    def _look(self, rows: RowsOfWhatIsLeft, acting: list[int]) -> None:
        """Shows the last row of a layer that lacks positions; all of these methods only look."""
        last = rows.new - 1
        a = rows.softmax(rows.scores(last, rows.new), last, rows.new)
        index = self.session.wanted.positions(rows.past + last, rows.total)
        for i in acting:
            self.session.methods[i].weights(self.session.states[i], self.layer, index, a)

    def _replaces_all(self, call: Call, acting: list[int]) -> bool:
        """Whether the kernel's output for the main rows would be written over as a whole."""
        session = self.session
        return (
            call.query.shape[2] == 1
            and session.untouched is None
            and not session.keeps_weights
            and any(session.methods[i].edits_all_heads for i in acting)
        )

    def _replaced(
        self, rows: AttentionRows, call: Call, kernel: Kernel, acting: list[int]
    ) -> Tensor:
        """A decoding step of which the kernel computes the auxiliary rows only."""
        first = dict.fromkeys(acting, 0)
        gain = self._gain(acting, rows.total)
        known = self._survey(rows, [(0, 1)], gain, first)
        a, _ = self._edited(rows, 0, 1, gain, first, known)
        new = rows.attend(a)
        b = self.session.rows
        if call.query.shape[0] == b:
            return new
        return torch.cat([new, kernel(call.below(b))[0]])

    def _edit(
        self, rows: AttentionRows, output: Tensor, weights: Tensor | None, acting: list[int]
    ) -> tuple[Tensor, Tensor | None]:
        session = self.session
        first = {i: session.wanted.first_row(i, rows.new) for i in acting}
        chunks = self._chunks(rows, first)
        gain = self._gain(acting, rows.total)
        known = self._survey(rows, chunks, gain, first)
        for start, end in chunks:
            a, changed = self._edited(rows, start, end, gain, first, known)
            if changed is not None:
                output = _write(output, rows.attend(a), changed.transpose(1, 2), start, end)
                if weights is not None:
                    weights = _write_weights(weights, a, changed, start, rows.dropped)
        return output, weights

    def _gain(self, acting: list[int], columns: int) -> Tensor | None:
        """The product of all gains on keys, [B, H, K]; keys that a method left out have 1."""
        methods, states = self.session.methods, self.session.states
        users = [i for i in acting if "keys" in methods[i].sites]
        gains = [methods[i].keys(states[i], self.layer) for i in users]
        return product(
            None if g is None else functional.pad(g, (0, columns - g.shape[-1]), value=1)
            for g in gains
        )

    def _chunks(self, rows: AttentionRows, first: dict[int, int]) -> list[tuple[int, int]]:
        """Rows that somebody wants, in chunks.

        Rows that are only looked at have their own: beside others a row is not computed to the
        same bits, and whoever looks must not change what an edited one becomes.
        """
        b, h = rows.query.shape[:2]
        step = max(1, _CHUNK // (b * h * rows.total))
        editing = [x for i, x in first.items() if not self._looks(i)]
        wanted = min(first.values())
        edited = min(editing, default=wanted)
        return [
            (start, min(start + step, end))
            for begin, end in ((wanted, edited), (edited, rows.new))
            for start in range(begin, end, step)
        ]

    def _looks(self, i: int) -> bool:
        """Whether a method changes no row."""
        method = self.session.methods[i]
        return _ON_ROWS & method.sites <= method.only_looks and "keys" not in method.sites

    def _survey(
        self,
        rows: AttentionRows,
        chunks: list[tuple[int, int]],
        gain: Tensor | None,
        first: dict[int, int],
    ) -> _Weights | None:
        """Shows all wanted rows to whoever surveys them.

        Returns:
            The weights, if one chunk held them all, so that they need not be computed again.
        """
        surveyors = [i for i in self.surveyors if i in first]
        if not surveyors:
            return None
        session = self.session
        for start, end in chunks:
            known = self._weights(rows, start, end, gain, first)
            a = known[0]
            for i in surveyors:
                own = max(first[i], start)
                if own < end:
                    index = session.wanted.positions(rows.past + own, rows.past + end)
                    session.methods[i].survey(
                        session.states[i], self.layer, index, a[:, :, own - start :]
                    )
        return known if len(chunks) == 1 else None

    def _weights(
        self, rows: AttentionRows, start: int, end: int, gain: Tensor | None, first: dict[int, int]
    ) -> _Weights:
        """Softmaxed rows after gains and deltas, and where those changed something."""
        session = self.session
        askers = [i for i in first if "scores" in session.methods[i].sites]
        # Deltas are of the plain scores, also beside gains.
        s = rows.scores(start, end, gain if not askers else None)
        delta = total(
            self._ask("scores", i, rows, start, end, s, first[i], first_value=0.0) for i in askers
        )
        changed = None
        if gain is not None:
            s = rows.scores(start, end, gain) if askers else s
            changed = _learned_or(gain, (gain != 1).any(-1)[:, :, None])
        if delta is not None:
            s = s + delta
            moved = _learned_or(delta, _anywhere(delta))
            changed = moved if changed is None else changed | moved
        return rows.softmax(s, start, end), changed

    def _edited(
        self,
        rows: AttentionRows,
        start: int,
        end: int,
        gain: Tensor | None,
        first: dict[int, int],
        known: _Weights | None,
    ) -> _Weights:
        """New weights of a chunk and bool [B, H, R] of the rows that changed; None if none can."""
        session = self.session
        before, changed = known or self._weights(rows, start, end, gain, first)

        def edit(i: int) -> Callable[[Tensor], Tensor | None]:
            return lambda a: self._ask("weights", i, rows, start, end, a, first[i])

        after = chain((edit(i) for i in first if "weights" in session.methods[i].sites), before)
        if after is not before:
            moved = _anywhere(after - before)
            changed = moved if changed is None else changed | moved
        if changed is None:
            return after, None
        changed = changed.expand(before.shape[:3])
        if session.untouched is not None:
            changed = changed & ~session.untouched[:, None, None]
        return after, changed

    def _ask(
        self,
        site: str,
        i: int,
        rows: AttentionRows,
        start: int,
        end: int,
        x: Tensor,
        first: int,
        first_value: float | None = None,
    ) -> Tensor | None:
        """One method's answer for the part of a chunk that it asked for.

        Rows before its own stay as given (``weights``) or get ``first_value`` (``scores``).
        """
        session, method = self.session, self.session.methods[i]
        own = max(first, start)
        if own >= end:
            return None
        index = session.wanted.positions(rows.past + own, rows.past + end)
        part = x[:, :, own - start :] if own > start else x
        new = getattr(method, site)(session.states[i], self.layer, index, part)
        if new is None:
            return None
        begins = session.wanted.tail_begins(i, rows.new)
        if begins is not None:  # rows of a batch whose images end at different positions
            outside = (index < begins[:, None])[:, None, :, None]
            new = torch.where(outside, part, new) if first_value is None else new * ~outside
        if own > start:
            given = x[:, :, : own - start]
            if first_value is not None:
                given = torch.full_like(given, first_value)
            new = torch.cat([given, new.expand(*part.shape[:3], -1)], dim=2)
        return new


def _learned_or(edit: Tensor, changed: Tensor) -> Tensor:
    """Where rows change: everywhere if the edit is being learned, whose gradients come from there.

    An edit that starts at the identity changes nothing yet, and would never learn to.
    """
    return torch.ones_like(changed) if edit.requires_grad else changed


def _anywhere(x: Tensor) -> Tensor:
    """Where a row is not all zero: bool [...]. Several times faster than ``(x != 0).any(-1)``."""
    return x.abs().amax(-1) != 0


def _write(output: Tensor, new: Tensor, changed: Tensor, start: int, end: int) -> Tensor:
    """``output`` with rows ``start`` to ``end`` replaced where bool [B, R, H] says so."""
    b = new.shape[0]
    part = torch.where(changed[..., None], new.to(output.dtype), output[:b, start:end])
    if part.shape[:2] == output.shape[:2]:
        return part
    if torch.is_grad_enabled() and output.requires_grad:
        output = output.clone()  # the kernel keeps its output for the backward pass
    output[:b, start:end] = part
    return output


def _write_weights(weights: Tensor, a: Tensor, changed: Tensor, start: int, dropped: int) -> Tensor:
    """The eager kernel's weights [rows, H, L, K] with the changed rows in place."""
    b, _, r, k = a.shape
    part = weights[:b, :, start : start + r, : k - dropped]
    new = torch.where(changed[..., None], a[..., dropped:].to(weights.dtype), part)
    weights = weights.clone()
    weights[:b, :, start : start + r, : k - dropped] = new
    return weights
