"""One-off auxiliary prefills: what ``prompt.run(branch, ...)`` does."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from mmlm.engine.branches.branch import Branch, Captured, Same
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["capture"]

#: Arguments of a main pass that an auxiliary one does not take over.
_OF_THE_MAIN_PASS = frozenset(
    {
        "output_attentions",
        "output_hidden_states",
        "past_key_values",
        "return_dict",
        "use_cache",
    }
)


class _Reached(Exception):  # noqa: N818
    """Ends an auxiliary pass once everything wanted has been captured."""


def capture(
    session: Session, branch: Branch, heads: tuple[int, ...], layers: tuple[int, ...]
) -> Captured:
    """Runs one auxiliary prefill up to the last of some layers and keeps what they gave.

    Args:
        session: The attachment; its prompt is beginning.
        branch: The auxiliary prompt.
        heads: Layers whose head outputs at the last position are kept.
        layers: Layers whose outputs at the last position are kept.

    Raises:
        LayoutError: If no prompt is beginning.
    """
    call = _call_of(session, branch)
    outputs: dict[int, Tensor] = {}
    states: dict[int, Tensor] = {}
    end = max(*heads, *layers, -1)

    def catch_heads(layer: int) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            outputs[layer] = session.anatomy.split_heads(args[0][:, -1]).float()
            if layer == end and layer not in layers:
                raise _Reached

        return hook

    def catch_layer(layer: int) -> Callable[[nn.Module, tuple[Any, ...], Any], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            x = output[0] if isinstance(output, tuple) else output
            states[layer] = x[:, -1].float()
            if layer == end:
                raise _Reached

        return hook

    with ExitStack() as stack:
        for layer in heads:
            part = session.anatomy.o_proj(layer)
            stack.callback(part.register_forward_pre_hook(catch_heads(layer)).remove)
        for layer in layers:
            block = session.anatomy.layers[layer]
            stack.callback(block.register_forward_hook(catch_layer(layer)).remove)
        session.repeating = branch == Same()
        try:
            session.call(**{**call, "use_cache": False, "logits_to_keep": 1})
        except _Reached:
            pass
        finally:
            session.repeating = False
    return Captured(heads=outputs, layers=states)


def _call_of(session: Session, branch: Branch) -> dict[str, Any]:
    """The inner model's arguments for one auxiliary prefill without a cache."""
    if session.source is None or session.beginning is None:
        raise LayoutError("No prompt is beginning.", advice="Call run() in begin().")
    if branch == Same():
        kept = {k: v for k, v in session.beginning.items() if k not in _OF_THE_MAIN_PASS}
        mask = session.full_layout.real
        return {**kept, "attention_mask": None if bool(mask.all()) else mask.long()}
    with session.quietly():
        prompt = branch.build(session.source)
    main = session.main_positions(session.beginning) if prompt.positions is None else None
    prompt = session.for_decoder(prompt, main)
    positions = prompt.positions
    types = {} if prompt.types is None else {"token_type_ids": prompt.types}
    return {
        **types,
        "inputs_embeds": prompt.embeds,
        "attention_mask": None if bool(prompt.mask.all()) else prompt.mask.long(),
        "position_ids": main if positions is None else positions,
        "layout": session.roles_of(prompt),
    }
