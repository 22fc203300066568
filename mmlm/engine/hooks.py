"""The hooks at the sites inside decoder layers: what turns a method's edit into the model's.

Each function returns one hook for one layer. Edits reach the main rows only: rows of auxiliary
branches that share the pass, and rows without an image, are left as they are.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.engine.combine import chain, product, total
from mmlm.engine.session import Session

__all__ = ["attended_hooks", "heads_hook", "layer_in_hook", "layer_out_hook", "mlp_hook"]


def layer_in_hook(session: Session, layer: int, users: list[int]) -> Callable[..., Any]:
    """Pre-hook of a decoder layer, with keyword arguments."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if session.quiet:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        new = _edit_states(session, "layer_in", layer, users, x)
        if new is x:
            return None
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    return hook


def layer_out_hook(session: Session, layer: int, users: list[int]) -> Callable[..., Any]:
    """Hook of a decoder layer; most return a tensor, some families a tuple."""
    return _output_hook("layer_out", session, layer, users)


def mlp_hook(session: Session, layer: int, users: list[int]) -> Callable[..., Any]:
    """Hook of what a layer adds to its residual for the MLP; experts return a tuple."""
    return _output_hook("mlp", session, layer, users)


def _output_hook(site: str, session: Session, layer: int, users: list[int]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if session.quiet:
            return None
        x = output[0] if isinstance(output, tuple) else output
        new = _edit_states(session, site, layer, users, x)
        if new is x:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _edit_states(session: Session, site: str, layer: int, users: list[int], x: Tensor) -> Tensor:
    rows = session.rows
    main = x[:rows] if x.shape[0] != rows else x

    def edit(i: int) -> Callable[[Tensor], Tensor | None]:
        function = getattr(session.methods[i], site)
        return lambda y: function(session.states[i], layer, y)

    new = chain((edit(i) for i in users), main)
    if new is main:
        return x
    if session.untouched is not None:
        new = torch.where(session.untouched[:, None, None], main, new)
    return new if main is x else torch.cat([new, x[rows:]])


def attended_hooks(
    session: Session, layer: int, users: list[int]
) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Pre-hook of a decoder layer, and hook of what it adds to its residual for the attention.

    The first keeps the residual; the second adds the methods' deltas on the sum of both.
    """
    residual: list[Tensor] = []

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        residual.clear()
        if not session.quiet:
            residual.append(args[0] if args else kwargs["hidden_states"])

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if session.quiet or not residual:
            return None
        y = output[0] if isinstance(output, tuple) else output
        x = residual.pop() + y
        rows, methods, states = session.rows, session.methods, session.states
        main = x[:rows] if x.shape[0] != rows else x
        delta = total(methods[i].attended(states[i], layer, main) for i in users)
        if delta is None:
            return None
        if session.untouched is not None:
            delta = delta.masked_fill(session.untouched[:, None, None], 0)
        new = y[:rows] + delta
        if main is not x:
            new = torch.cat([new, y[rows:]])
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return before, after


def heads_hook(session: Session, layer: int, users: list[int]) -> Callable[..., Any]:
    """Pre-hook of a layer's output projection: scales the heads' outputs."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> Any:
        if session.quiet:
            return None
        x = args[0]
        y = session.anatomy.split_heads(x)
        gain = product(head_gain(session, i, layer, y) for i in users)
        if gain is None:
            return None
        rest = x.shape[0] - gain.shape[0]
        if rest:
            gain = torch.cat([gain, gain.new_ones(rest, *gain.shape[1:])])
        return ((y * gain.to(y.dtype)).flatten(-2), *args[1:])

    return hook


def head_gain(session: Session, i: int, layer: int, y: Tensor) -> Tensor | None:
    """One method's gain, with 1 in every row that it must not touch."""
    method, rows, whole = session.methods[i], session.rows, y.shape[0]
    if not (session.riding and method.riders) and whole != rows:
        y = y[:rows]
    gain = method.heads(session.states[i], layer, y)
    if gain is None:
        return None
    if session.untouched is not None:
        copies = gain.shape[0] // rows
        gain = gain.masked_fill(session.untouched.repeat(copies)[:, None, None, None], 1)
    if gain.shape[0] == whole or not session.riding:
        return gain
    # Another method's riders are in this pass too: their rows stay as they are.
    return torch.cat([gain, gain.new_ones(whole - gain.shape[0], *gain.shape[1:])])
