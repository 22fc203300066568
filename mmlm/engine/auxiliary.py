"""Runs the auxiliary prompts of one main prompt, step by step with it.

Their prefill runs once, in one batch per prompt length. Decoding either goes on in the branches'
own caches, or, inside ``generate`` with an ordinary dynamic cache, *fused*: the branches' rows are
laid below the main rows in the main cache, and every step is one forward pass over all of them.
Either way the rows follow beam search through :func:`couple`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.cache_utils import DynamicCache, DynamicLayer

from mmlm.engine.branches import Branch, BranchPrompt
from mmlm.errors import LayoutError

__all__ = ["Auxiliary", "couple"]


@dataclass
class _Group:
    """Branches whose prompts have one length: one batch, one cache, [k * B, ...]."""

    branches: tuple[Branch, ...]
    embeds: Tensor | None
    mask: Tensor
    positions: Tensor | None
    cache: DynamicCache | None = None
    extra: int = field(default=0)  # columns added since the prompt

    def next_positions(self, main: Tensor | None, n: int) -> Tensor | None:
        """Position ids of the next ``n`` tokens; ``main`` are the main row's."""
        if self.positions is None:
            return None if main is None else _repeat(main, len(self.branches))
        step = torch.arange(n, device=self.positions.device)
        return self.positions[:, -1:] + 1 + self.extra + step

    def full_mask(self, n: int) -> Tensor | None:
        """2-D mask over prompt, past and ``n`` new columns; None if nothing is padded."""
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
    """

    def __init__(
        self,
        branches: tuple[Branch, ...],
        prompts: list[BranchPrompt],
        call: Callable[..., Any],
        rows: int,
        config: Any,
    ) -> None:
        self._call = call
        self._rows = rows
        self._config = config
        self.fused = False
        self._fused_mask: Tensor | None = None
        lengths: dict[tuple[int, bool], list[int]] = {}
        for i, prompt in enumerate(prompts):
            key = (prompt.embeds.shape[1], prompt.positions is None)
            lengths.setdefault(key, []).append(i)
        self._groups = [
            _Group(
                branches=tuple(branches[i] for i in members),
                embeds=torch.cat([prompts[i].embeds for i in members]),
                mask=torch.cat([prompts[i].mask for i in members]),
                positions=None
                if own
                else torch.cat([p for i in members if (p := prompts[i].positions) is not None]),
            )
            for (_, own), members in lengths.items()
        ]

    @property
    def branches(self) -> tuple[Branch, ...]:
        """All branches, in the order of their rows."""
        return tuple(branch for group in self._groups for branch in group.branches)

    def prefill(self, main_positions: Tensor | None) -> dict[Branch, Tensor]:
        """Runs the auxiliary prompts; returns last-position logits, fp32 [B, V] per branch."""
        logits: dict[Branch, Tensor] = {}
        for group in self._groups:
            group.cache = DynamicCache(config=self._config)
            if group.positions is not None:
                positions: Tensor | None = group.positions
            else:
                positions = group.next_positions(main_positions, group.mask.shape[1])
            output = self._call(
                inputs_embeds=group.embeds,
                attention_mask=group.full_mask(0),
                position_ids=positions,
                past_key_values=group.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            group.embeds = None  # the largest tensor here, and never needed again
            logits.update(self.split(group.branches, output.logits[:, -1]))
        return logits

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
            if group.positions is not None:
                group.positions = group.positions[whole]
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
            Whether it was done; if not, the branches keep caches of their own.
        """
        caches: list[Any] = [group.cache for group in self._groups]
        if not all(_is_plain(c) for c in (cache, *caches)):
            return False
        length = main_mask.shape[1]
        masks = [main_mask]
        for group in self._groups:
            masks.append(functional.pad(group.mask, (length - group.mask.shape[1], 0)))
        for i, layer in enumerate(cache.layers):
            parts = [c.layers[i] for c in caches]
            layer.keys = _stack([layer.keys, *(p.keys for p in parts)], length)
            layer.values = _stack([layer.values, *(p.values for p in parts)], length)
        for group in self._groups:
            group.cache = None
        whole = torch.cat(masks)
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
                three = main_positions.ndim == 3 and own.ndim == 2
                positions.append(own.expand(main_positions.shape[0], -1, -1) if three else own)
            group.extra += n
        changed["position_ids"] = torch.cat(positions, dim=-2)
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


def _is_plain(cache: Any) -> bool:
    return cache is not None and all(type(layer) is DynamicLayer for layer in cache.layers)


def _stack(parts: list[Any], length: int) -> Tensor:
    """Keys or values [rows, H, n, d] of all blocks, padded on the left to one length."""
    return torch.cat([functional.pad(x, (0, 0, length - x.shape[2], 0)) for x in parts])


def _repeat(positions: Tensor, times: int) -> Tensor:
    """Repeats the row dimension of position ids [B, L] or [3 or 4, B, L]."""
    return positions.repeat(*([1] * (positions.ndim - 2)), times, 1)
