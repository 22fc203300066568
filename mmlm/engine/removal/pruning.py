"""The ``tokens`` site: positions that leave the prompt between two decoder layers.

From the layer on at which a method drops them, positions are gone from the hidden states, from the
position embeddings, from the masks and, since keys are only made of what is there, from the caches.
Every later pass has its own mask for each layer. What stays keeps its position ids, so the result
equals that of masking the same keys instead; a method may ask for numbers without gaps, which the
layers behind the removal then count on from.

Rows may keep different numbers of positions: the shorter ones are padded on the left by columns
that nobody sees. All rows of one prompt (beams) keep the same.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor, nn

from mmlm.engine.guard import refuse_static
from mmlm.engine.masks.kinds import kind_of_layer, window
from mmlm.engine.masks.openings import opened
from mmlm.engine.removal.apart import Group, groups, install_apart
from mmlm.engine.removal.columns import Survivors, marked, step_mask, typed_mask
from mmlm.engine.vision.deepstack import unstacked
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["Pruning", "cut_arguments", "install_deep_features", "install_pruning"]


@dataclass(eq=False)
class _Stage:
    """What goes on from one layer to the next drop.

    Attributes:
        layer: The first layer without what was dropped.
        survivors: Columns of the whole prompt.
        kept: int64 [B, n]; the same with -1 where a row holds nothing.
        groups: Rows that run apart from the others, if some do.
        shift: int64 [B, n]; how many positions have left before each column since positions are
            numbered afresh; None if they are not.
        gone: int64 [B]; the same for positions behind the prompt.
        memo: Arguments of the decoder that were already cut, by their identity; in later passes
            masks that were already made.
        step: Positions before the pass that ``memo`` is about.
    """

    layer: int
    survivors: Survivors
    kept: Int[Tensor, "B n"]
    groups: tuple[Group, Group] | None = None
    shift: Int[Tensor, "B n"] | None = None
    gone: Int[Tensor, " B"] | None = None
    memo: dict[int, tuple[Any, Any]] = field(default_factory=dict)
    step: int = 0

    def cut(self, x: Any, function: Callable[[Any], Any]) -> Any:
        """``function(x)``, made once for all layers that are given the same ``x``."""
        if id(x) not in self.memo:
            self.memo[id(x)] = (x, function(x))
        return self.memo[id(x)][1]


class Pruning:
    """What is left of the running prompt, layer by layer.

    Args:
        session: The attachment.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self._width = 0
        self._stages: list[_Stage] = []
        self._left: Tensor | None = None  # states of what left, at their positions
        apart = [m.runs_apart for m in session.methods if "tokens" in m.sites]
        self.apart = min((n for n in apart if n is not None), default=None)

    def begin(self, cache: Any = None) -> None:
        """A prompt's first pass begins: everything is there.

        Args:
            cache: What the pass will fill.

        Raises:
            NeedsDynamicCache: If it has a fixed size and a method needs another.
        """
        if _is_static(cache):
            refuse_static(self.session.methods, "a static cache")
        self._width = self.session.layout.length
        self._stages, self._left = [], None

    def kept(self, layer: int | None = None) -> Int[Tensor, "B n"]:
        """Positions that are still there in a layer (default: after the last drop), -1 for none."""
        stage = self._stage(layer)
        if stage is not None:
            return stage.kept
        layout = self.session.layout
        index = torch.arange(layout.length, device=layout.seg.device)
        return torch.where(layout.real, index, -1)

    def groups(self, layer: int) -> tuple[Group, Group] | None:
        """Rows of the running prompt that run apart from the others in a layer."""
        stage = self._stage(layer)
        return None if stage is None else stage.groups

    def lacking(self, layer: int) -> tuple[Tensor, int] | None:
        """Positions that a layer still holds, and the prompt's length; None if it holds all."""
        stage = self._stage(layer)
        return None if stage is None else (stage.kept, self._width)

    def missing(self, layer: int) -> int:
        """How many columns fewer than the prompt's a layer's cache holds."""
        stage = self._stage(layer)
        return 0 if stage is None else self._width - stage.survivors.length

    def _stage(self, layer: int | None) -> _Stage | None:
        stages = [s for s in self._stages if layer is None or s.layer <= layer]
        return stages[-1] if stages else None

    def drop(self, layer: int, users: list[int], x: Tensor) -> Tensor:
        """Asks the methods what goes on from ``layer`` and returns the states of that.

        Raises:
            LayoutError: If the last position of a row is dropped, on which the next token depends.
        """
        session, standing = self.session, self.kept()
        alive = standing >= 0
        for i in users:
            keep = session.methods[i].tokens(session.states[i], layer, x)
            if keep is not None:
                alive = alive & marked(keep, x.shape[1], session.methods[i].label)
        if session.untouched is not None:
            alive = torch.where(session.untouched[:, None], standing >= 0, alive)
        if session.copies > 1:  # beams that differ in their last bits must not part here
            alive = alive[:: session.copies].repeat_interleave(session.copies, dim=0)
        if bool((alive == (standing >= 0)).all()):
            return x
        if not bool(alive[:, -1].all()):
            names = " + ".join(session.methods[i].label for i in users)
            raise LayoutError(
                f"{names} drops the last position of a prompt, which makes the next token.",
                advice="Keep it.",
            )
        chosen = Survivors.of(alive)
        kept = standing.gather(1, chosen.index).masked_fill(~chosen.valid, -1)
        whole = Survivors(kept.clamp(min=0), chosen.valid, self._width, chosen.whole)
        if not session.generating:
            self._left = self._scattered(x)
        apart = None
        if self.apart is not None:
            lost = session.layout.real.sum(1) > chosen.valid.sum(1)
            apart = groups(chosen.valid, lost, self.apart * session.copies)
        shift, gone = self._renumbered(users, standing, alive)
        if shift is not None:
            shift = shift.gather(1, chosen.index)
        self._stages.append(_Stage(layer, whole, kept, apart, shift, gone))
        return chosen.take(x)

    def _renumbered(
        self, users: list[int], standing: Tensor, alive: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        """By how much positions before, and behind, the prompt's end become smaller."""
        session, stage = self.session, self._stage(None)
        if any(session.methods[i].renumbers(session.anatomy) for i in users):
            shift = ((standing >= 0) & ~alive).long().cumsum(-1)
            gone = shift[:, -1]
        elif stage is None or stage.shift is None or stage.gone is None:
            return None, None
        else:
            shift, gone = torch.zeros_like(standing), torch.zeros_like(standing[:, 0])
        if stage is not None and stage.shift is not None and stage.gone is not None:
            shift, gone = shift + stage.shift, gone + stage.gone
        return shift, gone

    def _scattered(self, x: Tensor) -> Tensor:
        """States of all positions of the prompt, those of what left earlier as they left."""
        stage = self._stage(None)
        if stage is None or self._left is None:
            return x
        return stage.survivors.put(x, self._left)

    def prompt_arguments(self, layer: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """A layer's arguments, made by the decoder for the whole prompt, for what is left of it."""
        stage = self._stage(layer)
        if stage is None:
            return kwargs
        implementation = self.session.anatomy.text.config._attn_implementation or "eager"
        new = cut_arguments(stage.survivors, kwargs, layer, implementation, stage.cut)
        if stage.shift is not None:
            # The memo of the original ids holds them cut already.
            shift, given = stage.shift, new.get("position_ids")
            new |= self._fresh(stage, given, kwargs["position_embeddings"], lambda p: p - shift)
        return new

    def step_arguments(self, layer: int, kwargs: dict[str, Any], x: Tensor) -> dict[str, Any]:
        """A layer's arguments in a later pass: a mask of the width of its own cache."""
        stage = self._stage(layer)
        if stage is None:
            return kwargs
        mask = self._step_mask(stage, layer, x, kwargs["past_key_values"])
        kwargs = {**kwargs, "attention_mask": mask}
        if stage.gone is None:
            return kwargs
        gone, pair = stage.gone[:, None], kwargs["position_embeddings"]
        return kwargs | self._fresh(stage, kwargs.get("position_ids"), pair, lambda p: p - gone)

    def _fresh(
        self,
        stage: _Stage,
        places: Tensor | None,
        pair: tuple[Tensor, Tensor],
        number: Callable[[Tensor], Tensor],
    ) -> dict[str, Any]:
        """Position ids as ``number`` makes them of ``places``, and what is made of them."""
        if places is None:
            raise LayoutError(
                "Positions are to be numbered afresh, but the decoder tells its layers none.",
                advice="Use positions='original'.",
            )

        def make(given: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
            fresh = number(given)
            return fresh, self.session.anatomy.text.rotary_emb(pair[0], fresh)

        fresh, embeddings = stage.cut(places, make)
        return {"position_ids": fresh, "position_embeddings": embeddings}

    def _step_mask(self, stage: _Stage, layer: int, x: Tensor, cache: Any) -> Tensor | None:
        session, new, past = self.session, x.shape[1], self.session.past
        config = session.anatomy.text.config
        bound = window(config, kind_of_layer(config, layer))
        sizes = cache.get_mask_sizes(new, layer)
        if stage.step != past:
            stage.step = past
            stage.memo.clear()
        key = hash((new, sizes, bound))
        if key not in stage.memo:
            whole, span = stage.survivors.whole, (self._width, past, new)
            seen = step_mask(stage.kept, whole, span, sizes, bound, self._more(new, bound))
            stage.memo[key] = (None, None if seen is None else self._typed(seen, x.dtype))
        mask: Tensor | None = stage.memo[key][1]
        return mask

    def _more(self, new: int, bound: int | None) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What methods open in the running pass."""
        openings = self.session.openings
        rules, layout = ([], None) if openings is None or new == 1 else openings.now()
        if layout is None:
            return None
        roles = layout
        return lambda q, k: opened(rules, roles, q, k, bound)

    def _typed(self, seen: Tensor, dtype: torch.dtype) -> Tensor:
        implementation = self.session.anatomy.text.config._attn_implementation or "eager"
        if "flash" in implementation:  # which takes the columns that exist, and is causal itself
            return seen[:, -1].long()
        return typed_mask(seen[:, None], implementation, dtype)

    def leave(self, y: Tensor, norm: nn.Module) -> Tensor:
        """The decoder's output at every position; what left is what the norm makes of its state."""
        stage = self._stage(None)
        if stage is None or self._left is None:
            return y
        left, self._left = self._left, None
        return stage.survivors.put(y, norm.forward(left).to(y.dtype))


def cut_arguments(
    chosen: Survivors,
    kwargs: dict[str, Any],
    layer: int,
    implementation: str,
    cut: Callable[[Any, Callable[[Any], Any]], Any] = lambda x, function: function(x),
) -> dict[str, Any]:
    """A decoder layer's arguments, made for a whole prompt, for the columns that go on.

    Args:
        chosen: Those columns.
        kwargs: What the decoder gives to the layer in a prompt's first pass.
        layer: Its number.
        implementation: Name of the attention implementation.
        cut: Applies a function to an argument; may remember results, since layers share arguments.
    """
    new = dict(kwargs)
    pair = kwargs.get("position_embeddings")
    if pair is not None:
        new["position_embeddings"] = cut(pair, lambda p: tuple(map(chosen.take, p)))
    places = kwargs.get("position_ids")
    if places is not None:
        new["position_ids"] = cut(places, lambda p: chosen.take(p, dim=p.ndim - 1))
    mask = kwargs.get("attention_mask")
    if mask is not None:
        cache = kwargs.get("past_key_values")
        keys = None if cache is None else cache.get_mask_sizes(chosen.length, layer)[0]
        new["attention_mask"] = cut(mask, lambda m: chosen.take_mask(m, keys))
    elif not chosen.whole:
        new["attention_mask"] = cut(None, lambda _: _causal(chosen, implementation))
    return new


def _causal(chosen: Survivors, implementation: str) -> Tensor:
    """The mask of a prompt that had none, with the columns closed that only fill up rows."""
    if "flash" in implementation:
        return chosen.valid.long()
    n = chosen.length
    ones = torch.ones(1, 1, n, n, dtype=torch.bool, device=chosen.valid.device)
    return ones.tril() & chosen.valid[:, None, None]


def _is_static(cache: Any) -> bool:
    from transformers.cache_utils import StaticLayer

    layers = getattr(cache, "layers", None) or []
    return any(isinstance(layer, StaticLayer) for layer in layers)


def install_pruning(session: Session, stack: ExitStack) -> None:
    """Hooks the layers from the first on at which a method may drop positions.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    anatomy = session.anatomy
    deciding = {layer: session.users("tokens", layer) for layer in range(anatomy.n_layers)}
    first = next((layer for layer, users in deciding.items() if users), None)
    if first is None:
        return
    pruning = session.pruning = Pruning(session)
    for layer in range(first, anatomy.n_layers):
        hook = _layer_hook(pruning, layer, deciding[layer])
        block = anatomy.layers[layer]
        stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)
        if pruning.apart is not None:
            install_apart(pruning, layer, block, stack)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if session.quiet or session.past or session.generating:
            return None
        output.last_hidden_state = pruning.leave(output.last_hidden_state, anatomy.norm)
        return output

    # Before the exit of a compaction, which is installed earlier and makes the whole prompt of it.
    handle = anatomy.text.register_forward_hook(leave, prepend=True)
    stack.callback(handle.remove)


def install_deep_features(session: Session, stack: ExitStack) -> None:
    """Takes over what a family adds between its first layers, if positions may leave there.

    Args:
        session: The attachment; all other hooks on outputs of layers are installed.
        stack: Takes everything back on exit.
    """
    if session.pruning is None:
        return
    deep, anatomy = _DeepFeatures(session, session.pruning), session.anatomy
    stack.callback(anatomy.text.register_forward_pre_hook(deep.take_over, with_kwargs=True).remove)
    for layer in range(anatomy.n_layers):
        stack.callback(anatomy.layers[layer].register_forward_hook(deep.adder(layer)).remove)


def _layer_hook(pruning: Pruning, layer: int, users: list[int]) -> Callable[..., Any]:
    session = pruning.session

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if session.quiet:
            return None
        x = args[0] if args else kwargs["hidden_states"]
        if session.past:
            return args, pruning.step_arguments(layer, kwargs, x)
        new = pruning.drop(layer, users, x) if users else x
        kwargs = pruning.prompt_arguments(layer, kwargs)
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    return hook


class _DeepFeatures:
    """Features that a family adds to the outputs of its first layers, for what is left of a prompt.

    The decoder adds them at fixed positions between two layers, so the pass takes them over.
    """

    def __init__(self, session: Session, pruning: Pruning) -> None:
        self.session = session
        self.pruning = pruning
        self._levels: list[Tensor] = []

    def take_over(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Pre-hook of the decoder: takes the features out of its arguments."""
        self._levels = []
        if self.session.quiet or self.session.past:
            return None
        levels = unstacked(kwargs, kwargs["inputs_embeds"])
        if not levels:
            return None
        self._levels = levels
        return args, {**kwargs, "visual_pos_masks": None, "deepstack_visual_embeds": None}

    def adder(self, layer: int) -> Callable[..., Any]:
        """Hook of a layer: adds its features, after every edit of its output."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
            if self.session.quiet or layer >= len(self._levels):
                return None
            level = self._levels[layer]
            kept = self.pruning.kept(layer)
            index = kept.clamp(min=0)[..., None].expand(-1, -1, level.shape[-1])
            own = level.gather(1, index) * (kept >= 0)[..., None].to(level.dtype)
            return (output[0] + own, *output[1:]) if isinstance(output, tuple) else output + own

        return hook
