"""Runs the auxiliary prompts of one main prompt, step by step with it.

Their prefill runs once, in one batch per prompt length; what a prompt has in common with another
one at its beginning runs once for both (:mod:`mmlm.engine.branches.prefix`). Decoding either goes
on in the branches' own cache, or, inside ``generate`` with an ordinary dynamic cache, *fused*: the
branches' rows are laid below the main rows in the main cache, and every step is one forward pass
over all of them. Either way the rows follow beam search through :func:`couple`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmlm.engine.branches.blocks import below, is_plain, left_padded, stack, take, take_columns
from mmlm.engine.branches.branch import Branch, BranchPrompt
from mmlm.engine.branches.prefix import Beginning, Filled, common_beginning, copied
from mmlm.engine.layout import TokenLayout
from mmlm.errors import LayoutError

__all__ = ["Auxiliary", "couple"]


@dataclass
class _Group:
    """Branches that run as one batch with one cache, [k * B, ...]."""

    branches: tuple[Branch, ...]
    mask: Tensor
    positions: Tensor
    origin: Tensor
    cache: Any
    extra: int = field(default=0)  # columns added since the prompt

    def next_positions(self, main: Tensor | None, n: int) -> Tensor | None:
        """Position ids [k * B, n] of the next ``n`` tokens: on from the prompt's largest one.

        New tokens are text, which has one position in every axis. ``main`` are the main row's
        positions; None means that the caller leaves positions to the model.
        """
        last = self.positions.amax(-1, keepdim=True)
        last = last.amax(0) if last.ndim == 3 else last
        return last + 1 + self.extra + torch.arange(n, device=last.device)

    def close_gaps(self, n: int) -> None:
        """Moves masked columns to the front and keeps the last ``n``; before the first step."""
        index = self.mask.long().argsort(dim=1, stable=True)[:, -n:]
        self.positions, self.origin = take(self.positions, index), self.origin.gather(1, index)
        self.mask = self.mask.gather(1, index)
        for layer in self.cache.layers:
            layer.keys = take_columns(layer.keys, index)
            layer.values = take_columns(layer.values, index)

    def full_mask(self, n: int) -> Tensor | None:
        """2-D mask over prompt, past and ``n`` new columns; None if nothing is masked."""
        if bool(self.mask.all()):
            return None
        ones = self.mask.new_ones(self.mask.shape[0], self.extra + n)
        return torch.cat([self.mask, ones], dim=1).long()


class Auxiliary:
    """Runs the branches of one prompt, step by step with the main pass.

    Args:
        branches: Different branches, in the order of their rows.
        prompts: One prompt per branch.
        call: Runs the model on keyword inputs with all temporary methods off and returns its
            output.
        rows: Number of main rows B.
        config: The text decoder's configuration, from which caches are made.
        roles: The prompts' layouts, if the prefill needs them.
    """

    def __init__(
        self,
        branches: tuple[Branch, ...],
        prompts: list[BranchPrompt],
        call: Callable[..., Any],
        rows: int,
        config: Any,
        roles: list[TokenLayout | None],
    ) -> None:
        self._call = call
        self._rows = rows
        self._config = config
        self.fused = False
        self._fused_mask: Tensor | None = None
        self._prompts = dict(zip(branches, prompts, strict=True))
        self._roles = dict(zip(branches, roles, strict=True))
        self._groups: list[_Group] = []

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches, in the order of their rows."""
        return tuple(branch for group in self._groups for branch in group.branches)

    def prefill(
        self,
        main_positions: Tensor | None,
        *,
        main: Filled | None = None,
        share: bool = True,
    ) -> dict[Branch, Tensor]:
        """Runs the auxiliary prompts, those of one length as one batch.

        A prompt that begins as another one does continues that one's cache. Afterwards all
        branches are one batch, so that a step is one forward pass.

        Args:
            main_positions: The main prompt's position ids, or None if the model made them itself.
            main: The main prompt's cache, if no method changed what is in it.
            share: Whether beginnings may be shared at all.

        Returns:
            Last-position logits, fp32 [B, V] per branch.
        """
        # Where attention looks ahead, a beginning depends on what follows it.
        share = share and all(p.types is None for p in self._prompts.values())
        share = share and all(roles is None for roles in self._roles.values())
        later = [b for b in self._prompts if share and self._has_base(b, main)]
        logits = self._run_whole([b for b in self._prompts if b not in later], main_positions)
        shared: dict[Branch, Beginning] = {}
        for branch in later:
            if (beginning := self._beginning(branch, main_positions, main)) is not None:
                shared[branch] = beginning
        logits |= self._run_whole([b for b in later if b not in shared], main_positions)
        logits |= self._run_rest(shared, main_positions)
        if len(self._groups) > 1 and all(is_plain(group.cache) for group in self._groups):
            self._groups = [_joined(self._groups)]
        return logits

    def _run_whole(self, branches: list[Branch], main: Tensor | None) -> dict[Branch, Tensor]:
        """Prefills whole prompts, one batch per length."""
        logits: dict[Branch, Tensor] = {}
        for members in _by_length(self._prompts, branches):
            prompts = [self._prompts.pop(branch) for branch in members]
            roles = [r for r in map(self._roles.pop, members) if r is not None]
            types = [prompt.types for prompt in prompts if prompt.types is not None]
            group = _Group(
                branches=members,
                mask=torch.cat([prompt.mask for prompt in prompts]),
                positions=below([_positions(prompt, main) for prompt in prompts]),
                origin=torch.cat([_origin(prompt) for prompt in prompts]),
                cache=DynamicCache(config=self._config),
            )
            more = {"token_type_ids": torch.cat(types)} if types else {}
            layout = TokenLayout.below(roles) if roles else None
            embeds = [prompt.embeds for prompt in prompts]
            z = self._run(group, embeds, group.positions, **more, layout=layout)
            logits.update(z)
        return logits

    def _run_rest(
        self, shared: dict[Branch, Beginning], main: Tensor | None
    ) -> dict[Branch, Tensor]:
        """Prefills what follows shared beginnings, one batch per length."""
        logits: dict[Branch, Tensor] = {}
        for members in _by_length(self._prompts, list(shared)):
            prompts = [self._prompts.pop(branch) for branch in members]
            n, rest = prompts[0].mask.shape[1], max(shared[b].rest for b in members)
            length = max(shared[b].length for b in members)
            masks, places, origins = [], [], []
            for branch, prompt in zip(members, prompts, strict=True):
                index, wanted = shared[branch].whole(n, length, rest)
                masks.append(prompt.mask.gather(1, index) & wanted)
                places.append(take(_positions(prompt, main), index))
                origins.append(_origin(prompt).gather(1, index))
            group = _Group(
                branches=members,
                mask=torch.cat(masks),
                positions=below(places),
                origin=torch.cat(origins),
                cache=copied([shared[b] for b in members], length, self._config),
            )
            embeds = [prompt.embeds[:, n - rest :] for prompt in prompts]
            logits.update(self._run(group, embeds, group.positions[..., length:], layout=None))
            if group.mask.shape[1] > n:  # gaps between beginning and rest, in uneven batches
                group.close_gaps(n)
        return logits

    def _run(
        self, group: _Group, embeds: list[Tensor], positions: Tensor, **more: Any
    ) -> dict[Branch, Tensor]:
        width = max(x.shape[-1] for x in embeds)
        output = self._call(
            **more,
            inputs_embeds=torch.cat([functional.pad(x, (0, width - x.shape[-1])) for x in embeds]),
            attention_mask=group.full_mask(0),
            position_ids=positions,
            past_key_values=group.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        self._groups.append(group)
        return self.split(group.branches, output.logits[:, -1])

    def _has_base(self, branch: Branch, main: Filled | None) -> bool:
        """Whether there is a prompt that this one may begin with, run before it."""
        base = branch.base
        if base == "main":
            return main is not None
        return base in self._prompts and base.base is None

    def _beginning(
        self, branch: Branch, main_positions: Tensor | None, main: Filled | None
    ) -> Beginning | None:
        prompt = self._prompts[branch]
        source = main if branch.base == "main" else self._filled(branch.base)
        if source is None:
            return None
        positions = _positions(prompt, main_positions)
        return common_beginning(prompt.mask, positions, _origin(prompt), source)

    def _filled(self, branch: Branch | None) -> Filled | None:
        """A branch's rows in the cache that its prefill has filled."""
        for group in self._groups:
            if branch in group.branches and is_plain(group.cache):
                block = group.branches.index(branch)
                rows = slice(block * self._rows, (block + 1) * self._rows)
                layers = [(x.keys[rows], x.values[rows]) for x in group.cache.layers]
                return Filled(
                    layers, group.mask[rows], group.positions[..., rows, :], group.origin[rows]
                )
        return None

    def step(self, input_ids: Tensor, main_positions: Tensor | None) -> dict[Branch, Tensor]:
        """Feeds the new tokens [B, n] to every branch in its own cache."""
        logits: dict[Branch, Tensor] = {}
        n = input_ids.shape[1]
        for group in self._groups:
            output = self._call(
                input_ids=input_ids.repeat(len(group.branches), 1),
                attention_mask=group.full_mask(n),
                position_ids=group.next_positions(main_positions, n),
                past_key_values=group.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            group.extra += n
            logits.update(self.split(group.branches, output.logits[:, -1]))
        return logits

    def split(self, branches: tuple[Branch, ...], z: Tensor) -> dict[Branch, Tensor]:
        """Rows [k * B, V] of some branches as fp32 [B, V] per branch."""
        return dict(zip(branches, z.float().split(self._rows), strict=True))

    def select(self, index: Tensor) -> None:
        """Keeps and reorders rows as the main cache does; ``index`` are main rows.

        Rows of one beam group share their prompt, but not in every caller: masks and positions
        move along.
        """
        for group in self._groups:
            whole = self._index(index, len(group.branches))
            group.mask = group.mask[whole]
            group.positions = group.positions[..., whole, :]
            if group.cache is not None:
                group.cache.batch_select_indices(whole)
        if self._fused_mask is not None:
            self._fused_mask = self._fused_mask[self._index(index, 1 + len(self.branches))]
        self._rows = index.shape[0]

    def _index(self, index: Tensor, blocks: int) -> Tensor:
        offsets = torch.arange(blocks, device=index.device) * self._rows
        return (offsets[:, None] + index).flatten()

    # ---- fused decoding ----------------------------------------------------------------------

    def fuse(self, cache: Any, main_mask: Tensor) -> bool:
        """Lays the branches' rows below the main rows of ``cache``, if its layers allow that.

        Args:
            cache: The main cache after the prefill.
            main_mask: bool [B, N] of the main prompt.

        Returns:
            Whether it was done; if not (other kinds of cache, or a branch that is longer than the
            main prompt), the branches keep a cache of their own.
        """
        caches: list[Any] = [group.cache for group in self._groups]
        if not all(is_plain(c) for c in (cache, *caches)):
            return False
        length = main_mask.shape[1]
        if any(group.mask.shape[1] > length for group in self._groups):
            return False  # the main rows' columns must stay where they are
        whole = left_padded([main_mask, *(group.mask for group in self._groups)], length)
        stack(cache, caches, length)
        for group in self._groups:
            group.cache = None
        self._fused_mask = None if bool(whole.all()) else whole.long()
        self.fused = True
        return True

    def fused_inputs(self, inputs: dict[str, Any], main_positions: Tensor | None) -> dict[str, Any]:
        """The main step's inputs with the branches' rows below them."""
        if main_positions is None:
            raise LayoutError(
                "A fused step needs position_ids, which generate() always passes.",
                advice="Report this model family.",
            )
        blocks = 1 + len(self.branches)
        n = inputs["input_ids"].shape[1]
        changed = dict(inputs)
        for name in ("input_ids", "mm_token_type_ids", "token_type_ids"):
            if isinstance(inputs.get(name), Tensor):
                changed[name] = inputs[name].repeat(blocks, 1)
        positions = [main_positions]
        for group in self._groups:
            own = group.next_positions(main_positions, n)
            if own is not None:
                positions.append(own)
            group.extra += n
        changed["position_ids"] = below(positions)
        if self._fused_mask is not None:
            self._fused_mask = functional.pad(self._fused_mask, (0, n), value=1)
        changed["attention_mask"] = self._fused_mask
        return changed


def couple(cache: Any, auxiliary: Auxiliary) -> Callable[[], None]:
    """Makes the auxiliary rows follow every change of the main cache's rows.

    Replaces three methods on this one cache object, which ``generate`` calls in beam search.

    Returns:
        A function that takes the replacements off again.
    """
    select = cache.batch_select_indices

    def follow(index: Tensor) -> None:
        blocks = 1 + len(auxiliary.branches) if auxiliary.fused else 1
        whole = auxiliary._index(index, blocks)
        if all(isinstance(layer, DynamicLayer) for layer in cache.layers):
            select(whole)
        else:  # other layers know how to reorder only
            type(cache).reorder_cache(cache, whole)
        auxiliary.select(index)

    def repeat(repeats: int) -> None:
        rows = torch.arange(auxiliary._rows, device=cache.layers[0].keys.device)
        follow(rows.repeat_interleave(repeats))

    cache.reorder_cache = follow
    cache.batch_select_indices = follow
    cache.batch_repeat_interleave = repeat

    def release() -> None:
        for name in ("reorder_cache", "batch_select_indices", "batch_repeat_interleave"):
            vars(cache).pop(name, None)

    return release


def _by_length(
    prompts: Mapping[Branch, BranchPrompt], branches: list[Branch]
) -> list[tuple[Branch, ...]]:
    """Branches whose prompts have one length, in the order of their first ones."""
    lengths: dict[int, list[Branch]] = {}
    for branch in branches:
        lengths.setdefault(prompts[branch].mask.shape[1], []).append(branch)
    return [tuple(members) for members in lengths.values()]


def _positions(prompt: BranchPrompt, main: Tensor | None) -> Tensor:
    """Position ids of a prompt, [B, n] or [3, B, n]."""
    own = prompt.positions if prompt.positions is not None else main
    if own is None:  # as the model counts them itself
        own = torch.arange(prompt.mask.shape[1], device=prompt.mask.device)
        own = own.expand(prompt.mask.shape)
    return own[-3:] if own.ndim == 3 else own  # four axes: text positions stand in front


def _origin(prompt: BranchPrompt) -> Tensor:
    """Each column's position in the main prompt, -1 on padding."""
    if prompt.origin is not None:
        return prompt.origin
    columns = torch.arange(prompt.mask.shape[1], device=prompt.mask.device)
    begun = prompt.mask.long().cummax(-1).values.bool()
    return torch.where(begun, columns, -1)


def _joined(groups: list[_Group]) -> _Group:
    """Several groups as one, padded on the left to one length."""
    length = max(group.mask.shape[1] for group in groups)
    first, *others = (group.cache for group in groups)
    stack(first, others, length)
    axes = [functional.pad(g.positions, (length - g.positions.shape[-1], 0)) for g in groups]
    return _Group(
        branches=tuple(branch for group in groups for branch in group.branches),
        mask=left_padded([group.mask for group in groups], length),
        positions=below(axes),
        origin=left_padded([group.origin for group in groups], length),
        cache=first,
    )
