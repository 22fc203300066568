"""Gains on keys alone: the model's own kernel runs on scaled keys, and no row is computed twice.

``q . (g k) = g (q . k)``: a column of scores is multiplied by scaling its key. So any kernel does
it, with its own masks and fast paths, for all rows at once, and gradients reach the gains through
the keys. A gain belongs to a query head; where several query heads share a key, keys and values are
repeated, in this layer only and for the length of the call. The cache keeps raw keys.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.attention.rows import Call

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["PerHead", "columns_of", "on_scaled_keys"]


class PerHead:
    """An attention module as a kernel sees it whose keys stand once per query head.

    Kernels repeat keys by ``num_key_value_groups``; everything else is the module's own.
    """

    num_key_value_groups = 1

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


def on_scaled_keys(
    session: Session,
    layer: int,
    call: Call,
    gain: Tensor | None,
    kernel: Callable[[Call], tuple[Tensor, Tensor | None]],
) -> tuple[Tensor, Tensor | None]:
    """What the kernel makes of a call whose main rows have their keys scaled.

    Rows without an image and auxiliary rows keep the output of the plain call, bit for bit; only
    if there are any, the kernel runs twice.

    Args:
        session: The attachment.
        layer: Number of the layer.
        call: What the kernel was given.
        gain: [B, H, K] for the main rows and all positions of the sequence, or None.
        kernel: The model's own.

    Returns:
        The output [rows, L, H, d], and attention weights if the kernel returns them.
    """
    if gain is None:
        return kernel(call)
    gain = columns_of(session, layer, gain, call.key.shape[2])
    below = call.query.shape[0] - gain.shape[0]
    if not below and session.untouched is None:
        return kernel(call.scaled(gain))
    touched = torch.ones(gain.shape[0], dtype=torch.bool, device=gain.device)
    if session.untouched is not None:
        touched = ~session.untouched
    touched = functional.pad(touched, (0, below))
    whole = functional.pad(gain, (0, 0, 0, 0, 0, below), value=1)
    plain, weights = kernel(call)
    scaled, scaled_weights = kernel(call.scaled(whole))
    where = touched[:, None, None, None]
    if weights is not None and scaled_weights is not None:
        weights = torch.where(where, scaled_weights, weights)
    return torch.where(where, scaled, plain), weights


def columns_of(session: Session, layer: int, gain: Tensor, width: int) -> Tensor:
    """Gains by position as gains by column of a layer's keys.

    Columns that hold no position (fillers of a pruned row, the unused end of a static cache) are
    closed by the masks.

    Args:
        session: The attachment.
        layer: Number of the layer.
        gain: [B, H, K], K positions.
        width: Number of columns.

    Returns:
        [B, H, width].
    """
    if session.pruning is not None:  # some positions of the prompt may be gone from this layer
        prompt = session.layout.length
        index = session.pruning.kept(layer).clamp(min=0)[:, None].expand(-1, gain.shape[1], -1)
        gain = torch.cat([gain[..., :prompt].gather(2, index), gain[..., prompt:]], dim=-1)
    dropped = max(gain.shape[-1] - width, 0)  # by a sliding window
    gain = gain[..., dropped:]
    return functional.pad(gain, (0, width - gain.shape[-1]), value=1)
