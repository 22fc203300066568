"""The ``patches`` site: patches that leave a vision tower between two of its blocks.

From the block on after which methods drop them, patches are gone from the tower's states, masks,
window lengths and rotary positions, so that the rest of the tower really has less to do. Behind
the block that makes the image features nothing is computed any more. A projector that maps each
feature by itself gets the survivors only; one that merges patches first gets all places, with
zeros where nothing is left. Its output has a row for every feature again, and the positions of
those that are gone are taken out of the prompt by :mod:`mmlm.engine.removal.compaction`.

A block under gradient checkpointing computes a second time in the backward pass, when no picture is
in the tower: it is given the mask that it was given, by :class:`_Replays`.

In towers that pack all pictures into one sequence, and reorder it by windows, the rows of features
that are gone travel as NaN through the model's own code, which shows where they end up.
"""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import Tensor, nn

from mmlm.engine.shadow import shadow
from mmlm.engine.vision.patch_look import block_attention, catch_projections, refuse_unknown_tower
from mmlm.engine.vision.patch_rows import PackedRows, TileRows
from mmlm.engine.vision.tower import NORM_NAMES, feature_blocks, first_of
from mmlm.engine.vision.tower_pass import TowerPass

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["install_tower_pruning"]

#: The pass that is in the tower; None: none, or one that no method has a say in.
Running: TypeAlias = Callable[[], TowerPass | None]
#: How many first runs of blocks under gradient checkpointing are remembered (indices only).
_REMEMBERED = 4096


def install_tower_pruning(session: Session, stack: ExitStack) -> None:
    """Hooks the tower's blocks and the projector if a method chooses patches.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    everybody = session.users("patches")
    if not everybody:
        return
    anatomy = session.anatomy
    refuse_unknown_tower(anatomy)
    tower, methods = anatomy.tower, session.methods
    last = max(feature_blocks(anatomy))

    replays = _Replays()

    def running() -> TowerPass | None:
        return None if session.seeing is None else session.seeing.tower

    stack.callback(tower.register_forward_hook(_tower_hook(running)).remove)
    for number, block in enumerate(anatomy.tower_blocks):
        if number > last:
            _skip(block, running, stack)
            continue
        users = [i for i in everybody if methods[i].acts_in_tower(anatomy, number)]
        attention = block_attention(block)
        enter = _block_hook(running, replays, number)
        mask = _attention_hook(running, replays, number)
        stack.callback(block.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(attention.register_forward_pre_hook(mask, with_kwargs=True).remove)
        if users:
            catch_projections(attention, _place(running), stack)
        stack.callback(block.register_forward_hook(_leaving(running, number, users)).remove)
        if (norm := first_of(block, NORM_NAMES)) is not None:
            again = _norm_hook(running, replays, number)
            stack.callback(norm.register_forward_pre_hook(again).remove)
    _install_projector(session, running, stack)


class _Replays:
    """Which patches there were when a block under gradient checkpointing ran, by its input."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[int, int], TileRows] = OrderedDict()
        self.now: dict[int, TileRows] = {}  # of blocks that run a second time

    def note(self, block: int, x: Tensor, rows: TileRows) -> None:
        """A block is about to run on ``x``."""
        self._known[block, x.data_ptr()] = copy.copy(rows)
        while len(self._known) > _REMEMBERED:
            self._known.popitem(last=False)

    def begin(self, block: int, x: Tensor) -> None:
        """A block runs on ``x`` while no picture is in the tower."""
        rows = self._known.get((block, x.data_ptr()))
        self.now.pop(block, None)
        if rows is not None and rows.fits(x):
            self.now[block] = rows


def _checkpointed(block: Any) -> bool:
    return bool(block.training and getattr(block, "gradient_checkpointing", False))


def _tower_hook(running: Running) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current = running()
        if current is not None:
            current.restore(output)

    return hook


def _block_hook(running: Running, replays: _Replays, number: int) -> Callable[..., Any]:
    """Pre-hook of a block: its arguments for what is left."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current = running()
        x = args[0] if args else kwargs["hidden_states"]
        if current is None:
            return None
        if current.rows is None:
            names = list(inspect.signature(module.forward).parameters)
            bound = {**dict(zip(names, args, strict=False)), **kwargs}
            current.enter(x, bound.get("attention_mask"))
        rows = current.rows
        assert rows is not None
        if _checkpointed(module) and isinstance(rows, TileRows) and rows.cut_once:
            replays.note(number, x, rows)
        kwargs = rows.arguments(kwargs)
        current.caught["rotary"] = kwargs.get("position_embeddings")
        return args, kwargs

    return hook


def _attention_hook(running: Running, replays: _Replays, number: int) -> Callable[..., Any]:
    """Pre-hook of a block's attention: a mask for rows of different length."""

    def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        current, again = running(), replays.now.get(number)
        rows = again if current is None else current.rows
        if rows is None or not rows.cut_once:
            return None
        implementation = module.config._attn_implementation or "eager"
        x = args[0] if args else kwargs["hidden_states"]
        return args, rows.attention_arguments(kwargs, implementation, x.dtype)

    return hook


def _place(running: Running) -> Callable[[], dict[str, Any] | None]:
    def place() -> dict[str, Any] | None:
        current = running()
        return None if current is None else current.caught

    return place


def _norm_hook(running: Running, replays: _Replays, number: int) -> Callable[..., Any]:
    """Pre-hook of what a block computes first; its own hooks stand outside of a checkpoint."""

    def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if running() is None and module.training:
            replays.begin(number, args[0])

    return hook


def _leaving(running: Running, number: int, users: list[int]) -> Callable[..., Any]:
    def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        current = running()
        if current is None:
            return None
        x = output[0] if isinstance(output, tuple) else output
        new = current.finish_block(number, users, x)
        if new is x:
            return None
        return (new, *output[1:]) if isinstance(output, tuple) else new

    return hook


def _skip(block: Any, running: Running, stack: ExitStack) -> None:
    """A block whose output nobody reads: it hands on what it gets once patches have left."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
            current = running()
            if current is not None and current.cut:
                return hidden_states
            return original(hidden_states, *args, **kwargs)

        return forward

    shadow(block, "forward", wrap, stack)


def _install_projector(session: Session, running: Running, stack: ExitStack) -> None:
    """Hooks of the projector: only the survivors go in, and come out at their places."""
    anatomy = session.anatomy

    def before(module: nn.Module, args: tuple[Any, ...]) -> Any:
        current = running()
        if current is None or not current.cut or args[0].ndim != 3:
            return None
        if not anatomy.family.projects_each or session.pooling is not None:
            return None  # a pooled grid is no smaller for what left it
        current.chosen = current.survivors(args[0].shape[1])
        return (current.chosen.take(args[0]), *args[1:])

    def after(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        current = running()
        if current is None or not current.cut:
            return None
        if isinstance(current.rows, PackedRows):
            return current.merged(output, torch.nan)
        if current.chosen is None:
            current.survivors(output.shape[1])
            return None
        chosen, current.chosen = current.chosen, None
        return chosen.put(output, output.new_zeros(len(output), chosen.width, output.shape[-1]))

    projector = anatomy.projector
    stack.callback(projector.register_forward_pre_hook(before).remove)
    stack.callback(projector.register_forward_hook(after).remove)

    def deep(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Any:
        current = running()
        if current is None or not current.cut:
            return None
        return current.merged(output, 0.0)

    # Features that enter several decoder layers are made along the way.
    for merger in getattr(anatomy.tower, "deepstack_merger_list", None) or ():
        stack.callback(merger.register_forward_hook(deep).remove)
