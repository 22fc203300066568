"""Keys and values of captions, kept; and several sentences at once, drawn as a tree behind them.

Samples of one caption have its beginning in common, and often their own first words too. Here each
*different* beginning of a sample is one node: its keys and values stand once in the cache, behind
the caption's, and the mask lets a node see the caption, its own ancestors and itself. So a caption
is one row however many samples are drawn, nothing is copied when two samples part, and a sample
that has ended leaves at once. Captions of several pictures are the rows of a batch, padded on the
left.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicCache

from data_tools.generators.roomy import RoomyLayer
from mmlm.engine.masks.kinds import kinds, window
from mmlm.engine.removal.columns import typed_mask

__all__ = ["Kept", "Rows", "extend", "prefill"]


@dataclass(frozen=True, eq=False)
class Kept:
    """A prompt that a model has read.

    Attributes:
        ids: Its token ids.
        layers: (keys, values) of each layer, [H, n, d].
        logits: Of the token behind it, fp32 [V].
        shift: What is to be added to an index to get its position id, behind the picture.
        n_fixed: So many ids, from the first on, cannot be read again by themselves: the picture, or
            a question that attends to what follows.
        axes: Axes of position ids, 0 if there is one only.
    """

    ids: tuple[int, ...]
    layers: list[tuple[Tensor, Tensor]]
    logits: Float[Tensor, "V"]
    shift: int
    n_fixed: int
    axes: int

    def common(self, ids: Sequence[int]) -> int:
        """How many ids, from the first on, are the same."""
        n = min(len(ids), len(self.ids))
        return next((i for i in range(n) if ids[i] != self.ids[i]), n)

    def can_become(self, ids: Sequence[int]) -> bool:
        """Whether a prompt can be read from this one on."""
        if tuple(ids) == self.ids:
            return True
        return min(self.common(ids), len(ids) - 1) >= self.n_fixed


def prefill(model: Any, inputs: dict[str, Tensor], n_fixed: int) -> Kept:
    """Reads a fresh prompt, one row without padding.

    Args:
        model: A Hugging Face vision-language model.
        inputs: The prompt, pictures included.
        n_fixed: See `Kept`.
    """
    cache = DynamicCache()  # without the configuration: keeps every position of every layer
    places: list[Tensor | None] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        places.append(kwargs.get("position_ids"))

    # How a family counts positions behind a picture is its own affair: read it off.
    handle = model.get_decoder().register_forward_pre_hook(note, with_kwargs=True)
    try:
        output = model(**inputs, past_key_values=cache, use_cache=True, logits_to_keep=1)
    finally:
        handle.remove()
    ids = inputs["input_ids"][0].tolist()
    position = places[0]
    last = len(ids) - 1 if position is None else int(position[..., -1].max())
    axes = 3 if position is not None and position.ndim == 3 else 0
    return Kept(
        ids=tuple(ids),
        layers=[_first_row(layer) for layer in cache.layers],
        logits=output.logits[0, -1].float(),
        shift=last + 1 - len(ids),
        n_fixed=n_fixed,
        axes=axes,
    )


def extend(model: Any, kept: Sequence[Kept], prompts: Sequence[Sequence[int]]) -> list[Kept]:
    """Reads on: prompts that begin as ones that were read.

    The rows of one pass read equally many tokens, their prompt's last ones. Those that differ in
    fewer read some once more: no row is padded, and no column lies between prompt and rest.

    Args:
        model: The model.
        kept: What was read.
        prompts: What each `Kept.can_become`.

    Returns:
        The new ones, in order.
    """
    result = list(kept)
    todo = [i for i, one in enumerate(kept) if tuple(prompts[i]) != one.ids]
    rest = {i: max(len(prompts[i]) - kept[i].common(prompts[i]), 1) for i in todo}
    todo.sort(key=lambda i: -rest[i])
    while todo:
        count = rest[todo[0]]
        now = [i for i in todo if i == todo[0] or len(prompts[i]) - count >= kept[i].n_fixed]
        todo = [i for i in todo if i not in now]
        for i, new in zip(
            now, _read_on(model, [kept[i] for i in now], [prompts[i] for i in now], count),
            strict=True,
        ):  # fmt: skip
            result[i] = new
    return result


def _read_on(model: Any, kept: list[Kept], prompts: list[Sequence[int]], count: int) -> list[Kept]:
    starts = [len(prompt) - count for prompt in prompts]
    rows = Rows(model, kept, starts, room=count)
    device = rows.device
    tokens = torch.tensor([list(prompt[-count:]) for prompt in prompts], device=device)
    order = torch.arange(count, device=device)
    among = (order[:, None] >= order).expand(len(kept), -1, -1)
    before = rows.real[:, None].expand(-1, count, -1)
    logits = rows.read(tokens, torch.cat([before, among], dim=-1), order, last_only=True)[:, -1]
    layers = rows.layers()
    new = []
    for row, (one, prompt) in enumerate(zip(kept, prompts, strict=True)):
        first = rows.width - len(prompt)
        own = [(k[row, :, first:].clone(), v[row, :, first:].clone()) for k, v in layers]
        new.append(Kept(tuple(prompt), own, logits[row].clone(), one.shift, one.n_fixed, one.axes))
    return new


class Rows:
    """Prompts that were read, side by side in one cache, and what is read behind them.

    Args:
        model: The model.
        kept: The prompts.
        lengths: How many of each one's tokens to take; default: all.
        room: Columns that are made at once for what is read behind.

    Attributes:
        real: bool [P, n], columns that are no padding.
        width: Columns of the cache.
    """

    def __init__(
        self,
        model: Any,
        kept: Sequence[Kept],
        lengths: Sequence[int] | None = None,
        room: int = 64,
    ) -> None:
        lengths = [len(one.ids) for one in kept] if lengths is None else lengths
        self._model = model
        self._config = model.config.get_text_config()
        self._axes = kept[0].axes
        n = self.width = max(lengths)
        self._layers: list[RoomyLayer] = []
        for layer in range(len(kept[0].layers)):
            pair = [
                _side_by_side([one.layers[layer][x] for one in kept], lengths, room) for x in (0, 1)
            ]
            self._layers.append(RoomyLayer(pair[0], pair[1], n))
        self._cache = DynamicCache()
        self._cache.layers.extend(self._layers)
        self.device = kept[0].logits.device
        sizes = torch.tensor(lengths, device=self.device)
        columns = torch.arange(n, device=self.device)
        self.real: Bool[Tensor, "P n"] = columns >= n - sizes[:, None]
        shifts = torch.tensor([one.shift for one in kept], device=self.device)
        self._next = sizes + shifts  # position id of the first token behind each prompt
        self._places = columns  # distance in these is distance in the text, in every row
        self._begin = n

    def read(
        self,
        tokens: Int[Tensor, "P S"],
        seen: Bool[Tensor, "P S W"],
        depth: Int[Tensor, "S"] | int,
        *,
        last_only: bool = False,
    ) -> Float[Tensor, "P S V"]:
        """One pass.

        Args:
            tokens: What is read by each row.
            seen: Which columns each of them sees, the new ones included.
            depth: How far behind its prompt each of them stands.
            last_only: Give logits of the last ones only.

        Returns:
            Logits of what follows each token.
        """
        count = tokens.shape[1]
        far = torch.as_tensor(depth, device=self.device).expand(count)
        self._places = torch.cat([self._places, self._begin + far])
        positions = self._next[:, None] + far
        if self._axes:
            positions = positions.expand(self._axes, -1, -1)
        output = self._model(
            input_ids=tokens,
            attention_mask=self._masks(seen, self._begin + far),
            position_ids=positions,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=1 if last_only else 0,
        )
        self.width += count
        logits: Tensor = output.logits
        return logits.float()

    def _masks(self, seen: Tensor, places: Tensor) -> Any:
        """As the decoder takes it: one mask, or one per kind of layer if it has several."""
        found = kinds(self._config)
        made = {}
        for kind in found:
            inside = seen
            bound = window(self._config, kind)
            if bound is not None:
                inside = seen & (self._places > places[:, None] - bound)
            made[kind] = typed_mask(
                inside[:, None], self._config._attn_implementation, self._model.dtype
            )
        return made if len(found) > 1 else made[found[0]]

    def layers(self) -> list[tuple[Tensor, Tensor]]:
        """(keys, values) of each layer, [P, H, width, d]."""
        return [layer.shown for layer in self._layers]

    def keep(self, rows: Int[Tensor, "p"]) -> None:
        """Drops the other rows."""
        for layer in self._layers:
            layer.keep(rows)
        self.real, self._next = self.real[rows], self._next[rows]


def _first_row(layer: Any) -> tuple[Tensor, Tensor]:
    return layer.keys[0], layer.values[0]


def _side_by_side(parts: list[Tensor], lengths: Sequence[int], room: int) -> Tensor:
    """Rows [H, n_i, d], each cut to its length, right-aligned in zeros, with room behind."""
    longest = max(lengths)
    first = parts[0]
    whole = first.new_zeros(len(parts), first.shape[0], longest + room, first.shape[2])
    for row, (part, length) in enumerate(zip(parts, lengths, strict=True)):
        whole[row, :, longest - length : longest] = part[:, :length]
    return whole
