"""The hooks at the sites inside decoder layers: what turns a method's edit into the model's.

Each function returns one hook for one layer. Edits reach the main rows only: rows of auxiliary
branches that share the pass, and rows without an image, are left as they are (but for heads of a
method that says otherwise: ``edits_without_image``).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.engine.combine import chain, product, total
from mmlm.engine.session import Moment, Session

__all__ = ["heads_hook", "install_attended", "layer_in_hook", "layer_out_hook", "mlp_hook"]


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


def install_attended(session: Session, layer: int, users: list[int], stack: ExitStack) -> None:
    """Hooks a decoder layer between its attention and its MLP.

    The residual is what enters the layer's first norm; the methods' deltas on the sum go with what
    the attention adds to it. Activations may be recomputed in a backward pass, when the session is
    at another prompt: so a layer in training carries the moment of its own pass in its arguments.

    Args:
        session: The attachment.
        layer: Number of the layer.
        users: Numbers of the methods that act there.
        stack: Takes everything back on exit.
    """
    anatomy, block = session.anatomy, session.anatomy.layers[layer]
    attention = anatomy.attention(layer)
    latest: list[Moment | None] = [None]  # of the last pass
    running: list[Moment | None] = [None]  # of the pass that is computed, maybe again
    residual: list[Tensor] = []
    entered: list[bool] = []  # somebody may run the parts of a layer by themselves
    carries = any(
        p.kind is p.VAR_KEYWORD for p in inspect.signature(block.forward).parameters.values()
    )

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered[:] = [True]
        latest[0] = session.moment() if module.training and not session.quiet else None
        if latest[0] is None or not carries:
            return None
        return args, {**kwargs, _MOMENT: latest[0]}

    def attend(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        running[0] = kwargs.get(_MOMENT) if carries else latest[0]
        if not anatomy.has_input_norm(layer):
            residual[:] = [args[0] if args else kwargs["hidden_states"]]
        return args, {k: v for k, v in kwargs.items() if k != _MOMENT}

    def first(module: nn.Module, args: tuple[Any, ...]) -> None:
        residual[:] = [args[0]]

    def added(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        alive = running[0] is not None if block.training else bool(entered) and not session.quiet
        entered.clear()
        if not residual or not alive:
            residual.clear()
            return None
        y = output[0] if isinstance(output, tuple) else output
        with session.at(running[0]):
            new = _with_deltas(session, layer, users, residual.pop(), y)
        if new is y:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(attention.register_forward_pre_hook(attend, with_kwargs=True).remove)
    if anatomy.has_input_norm(layer):
        stack.callback(anatomy.input_norm(layer).register_forward_pre_hook(first).remove)
    stack.callback(anatomy.attended(layer).register_forward_hook(added).remove)


#: Name of the argument of a layer that carries the moment of its pass.
_MOMENT = "mmlm_moment"


def _with_deltas(
    session: Session, layer: int, users: list[int], residual: Tensor, y: Tensor
) -> Tensor:
    """What the attention adds, with the methods' deltas on its sum with the residual."""
    x, rows = residual + y, session.rows
    main = x[:rows] if x.shape[0] != rows else x
    delta = total(session.methods[i].attended(session.states[i], layer, main) for i in users)
    if delta is None:
        return y
    if session.untouched is not None:
        delta = delta.masked_fill(session.untouched[:, None, None], 0)
    return y + delta if main is x else torch.cat([y[:rows] + delta, y[rows:]])


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
    if session.untouched is not None and not method.edits_without_image:
        copies = gain.shape[0] // rows
        gain = gain.masked_fill(session.untouched.repeat(copies)[:, None, None, None], 1)
    if gain.shape[0] == whole or not session.riding:
        return gain
    # Another method's riders are in this pass too: their rows stay as they are.
    return torch.cat([gain, gain.new_ones(whole - gain.shape[0], *gain.shape[1:])])
