"""The ``visual_tokens`` site: image features that never enter the decoder.

The prompt's placeholders are filled as always, then the positions of features that no method keeps
are taken out before the first layer. What is left keeps its position ids, unless a method asks for
numbers without gaps; then decoding goes on from the smaller ones. The caches, the layout and every
site see the shorter prompt only. Features whose patches left the vision tower (``patches``) go the
same way.

A feature's position is found through the model's own packing
(:class:`mmlm.engine.vision.sight.Sight`). A line end stays if anything in its line stays.
"""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.branches.branch import BranchPrompt
from mmlm.engine.layout import TokenLayout
from mmlm.engine.masks.base_masks import written_out
from mmlm.engine.masks.kinds import SLIDING, first_layer, kinds, window
from mmlm.engine.removal.columns import Survivors, marked, step_mask, typed_mask
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["Compaction", "choose_features", "install_compaction"]


@dataclass(frozen=True, eq=False)
class Compaction:
    """Which positions of a prompt enter the decoder.

    Attributes:
        full: Roles of the positions before anything is taken out.
        alive: bool [B, N]; what stays. Padding does not count as staying.
        survivors: The columns chosen by it.
        layout: Roles of the n positions that stay.
        shift: int64 [B, N]; how many positions have left before each one, if the others are
            numbered afresh.
    """

    full: TokenLayout
    alive: Bool[Tensor, "B N"]
    survivors: Survivors
    layout: TokenLayout
    shift: Int[Tensor, "B N"] | None = None

    @classmethod
    def of(
        cls, full: TokenLayout, alive: Bool[Tensor, "B N"], renumber: bool = False
    ) -> Compaction:
        """The compaction that keeps ``alive``."""
        survivors = Survivors.of(alive)
        index = survivors.index.masked_fill(~survivors.valid, -1)
        shift = (full.real & ~alive).long().cumsum(-1) if renumber else None
        return cls(full, alive, survivors, full.gather(index), shift)

    def _moved(self, places: Tensor) -> Tensor:
        """Position ids [R or 1, N] of the whole prompt; those of main rows without gaps."""
        if self.shift is None:
            return places
        more = max(places.shape[0] - self.layout.rows, 0)  # riding rows have ids of their own
        return places - functional.pad(self.shift, (0, 0, 0, more))

    def enter(
        self, kwargs: dict[str, Any], rows: Bool[Tensor, "R N"] | None, config: Any
    ) -> dict[str, Any]:
        """The decoder's arguments for a prompt's first pass, without what leaves.

        Args:
            kwargs: The decoder's own.
            config: The decoder's configuration.
            rows: Columns of auxiliary rows that ride below the main ones, if there are any.
        """
        chosen = self.survivors if rows is None else self.survivors.below(rows)
        n = chosen.length
        embeds, mask = kwargs["inputs_embeds"], kwargs.get("attention_mask")
        places = kwargs.get("position_ids")
        if places is None:
            places = torch.arange(chosen.width, device=embeds.device)[None]
        new: dict[str, Any] = {
            "inputs_embeds": chosen.take(embeds),
            "position_ids": chosen.take(self._moved(places), dim=places.ndim - 1),
        }
        cache = kwargs.get("past_key_values")
        if SLIDING in kinds(config) and not isinstance(mask, dict):
            # A window counts positions, so it is cut from the mask of the whole prompt.
            mask = written_out(config, kwargs)
        if isinstance(mask, dict):
            new["attention_mask"] = {
                kind: None if one is None else chosen.take_mask(one, _keys(cache, config, kind, n))
                for kind, one in mask.items()
            }
        elif mask is not None and mask.ndim == 4:
            keys = _keys(cache, config, kinds(config)[0], n)
            new["attention_mask"] = chosen.take_mask(mask, keys)
        else:
            # Never None: position ids with gaps would pass for several documents in one row.
            new["attention_mask"] = chosen.valid.long() if mask is None else chosen.take_mask(mask)
        if kwargs.get("visual_pos_masks") is not None:
            where = kwargs["visual_pos_masks"]
            staying = torch.zeros_like(where).scatter(1, chosen.index, chosen.valid)[where]
            new["visual_pos_masks"] = chosen.take(where) & chosen.valid
            deep = kwargs.get("deepstack_visual_embeds") or []
            new["deepstack_visual_embeds"] = [level[staying] for level in deep]
        return {**kwargs, **new}

    def step(self, kwargs: dict[str, Any], past: int, config: Any) -> dict[str, Any]:
        """The decoder's arguments for a later pass: a mask of the width that the caches have.

        Args:
            kwargs: The decoder's own.
            past: Positions before the new ones, as the shorter prompt counts them.
            config: The decoder's configuration.

        Raises:
            LayoutError: If the caller leaves the positions to the model.
        """
        if kwargs.get("position_ids") is None:
            raise LayoutError(
                "Image features were taken out of the prompt, so the cache's length does not tell "
                "the positions of new tokens.",
                advice="Pass position_ids, as generate() does.",
            )
        new, mask = kwargs["inputs_embeds"].shape[1], kwargs.get("attention_mask")
        if self.shift is not None:
            places, rows = kwargs["position_ids"], kwargs["inputs_embeds"].shape[0]
            gone = functional.pad(self.shift[:, -1:], (0, 0, 0, rows - self.layout.rows))
            kwargs = {**kwargs, "position_ids": places - gone}
        if kwargs["inputs_embeds"].shape[0] > self.layout.rows:  # auxiliary rows, with their mask
            return kwargs
        later = past + new - self.layout.length
        if isinstance(mask, Tensor) and mask.ndim == 2:
            tail = mask[:, mask.shape[1] - later :].bool()
        else:
            tail = self.layout.real.new_ones(self.layout.rows, later)
        if SLIDING in kinds(config):
            masks = self._by_position(kwargs, past, config)
            return {**kwargs, "attention_mask": masks}
        # Made for the whole prompt: too wide, or written out already.
        mask = torch.cat([self.layout.real, tail], dim=1).long()
        return {**kwargs, "attention_mask": mask}

    def _by_position(self, kwargs: dict[str, Any], past: int, config: Any) -> Any:
        """Masks of a later pass whose windows count positions, as in the prompt's first pass."""
        embeds, cache = kwargs["inputs_embeds"], kwargs["past_key_values"]
        new, chosen = embeds.shape[1], self.survivors
        implementation = config._attn_implementation or "eager"
        kept = chosen.index.masked_fill(~chosen.valid, -1)
        span = (chosen.width, past + chosen.width - chosen.length, new)
        masks: dict[str, Tensor | None] = {}
        for kind in kinds(config):
            sizes = cache.get_mask_sizes(new, first_layer(config, kind))
            seen = step_mask(kept, chosen.whole, span, sizes, window(config, kind))
            if seen is not None:
                masks[kind] = typed_mask(seen[:, None], implementation, embeds.dtype)
            else:
                masks[kind] = None
        return masks if len(masks) > 1 else next(iter(masks.values()))

    def leave(
        self,
        entered: Float[Tensor, "R N D"],
        y: Float[Tensor, "R n D"],
        norm: nn.Module,
        rows: Bool[Tensor, "R2 N"] | None,
    ) -> Float[Tensor, "R N D"]:
        """The decoder's output at every position; what left is what the norm makes of its input."""
        chosen = self.survivors if rows is None else self.survivors.below(rows)
        return chosen.put(y, norm.forward(entered).to(y.dtype))

    def branch(self, prompt: BranchPrompt, places: Tensor | None) -> BranchPrompt:
        """An auxiliary prompt without the same features.

        Args:
            prompt: Built from the whole prompt.
            places: The main prompt's position ids before anything was taken out.
        """
        origin = prompt.origin
        if origin is None:
            alive, own = self.alive, prompt.positions if prompt.positions is not None else places
            shift = self.shift
        else:
            # Columns that are not the main prompt's are padding, or words that were added.
            added = origin < 0
            alive = torch.where(added, prompt.mask, self.alive.gather(1, origin.clamp(min=0)))
            own = prompt.positions
            gone = ~added & ~alive & prompt.mask
            shift = None if self.shift is None else gone.long().cumsum(-1)
        chosen = Survivors.of(alive)
        if own is None:
            own = torch.arange(chosen.width, device=alive.device)[None]
        own = own if shift is None else own - shift
        own = chosen.take(own, dim=own.ndim - 1)
        return replace(
            prompt,
            embeds=chosen.take(prompt.embeds) * chosen.valid[..., None].to(prompt.embeds.dtype),
            mask=chosen.take(prompt.mask) & chosen.valid,
            positions=own,
            types=None if prompt.types is None else chosen.take(prompt.types),
            ids=None if prompt.ids is None else chosen.take(prompt.ids),
            origin=None if origin is None else chosen.take(origin),
        )


def install_compaction(session: Session, stack: ExitStack) -> None:
    """Hooks the decoder's entrance and exit if a method chooses features.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    if not any(session.users(site) for site in ("visual_tokens", "patches", "pool")):
        return
    text = session.anatomy.text
    entered: list[Tensor] = []  # embeddings of the running pass, until it ends

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        entered.clear()
        plan = session.compaction
        if plan is None or (session.quiet and not session.repeating):
            return None
        if not session.quiet and session.past:
            return args, plan.step(kwargs, session.past, module.config)
        if not session.generating and not session.quiet:
            entered.append(kwargs["inputs_embeds"])
        return args, plan.enter(kwargs, session.riding_real, module.config)

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        if session.quiet or not entered or session.compaction is None:
            return None
        y = session.compaction.leave(
            entered.pop(), output.last_hidden_state, session.anatomy.norm, session.riding_real
        )
        output.last_hidden_state = y
        return output

    stack.callback(text.register_forward_pre_hook(enter, with_kwargs=True).remove)
    stack.callback(text.register_forward_hook(leave).remove)


def choose_features(session: Session, full: TokenLayout) -> Compaction | None:
    """Asks the methods which features of the prompt's pictures enter the decoder.

    Args:
        session: The attachment; its pictures have been encoded.
        full: Roles of the prompt's positions.

    Returns:
        None if all of them do.
    """
    choosing, pooling = session.users("visual_tokens"), session.pooling
    users = sorted({*choosing, *session.users("patches"), *session.users("pool")})
    methods = [session.methods[i] for i in users]
    renumber = any(method.renumbers(session.anatomy) for method in methods)
    alive, sight = _wanted(session, choosing), session.sight
    if pooling is not None and pooling.passes:
        # Methods that choose features have a say in the originals, not in what is pooled.
        staying = pooling.alive({} if alive is None else {"image": alive})
        if staying is not None:
            return Compaction.of(full, staying, renumber)
    if alive is None or sight is None or bool(alive.all()):
        return None
    # What stays, what is a patch at all, and what belongs to a picture's overview.
    marks = torch.stack([alive.float(), torch.ones_like(alive).float(), _overview(session)], -1)
    packed = sight.pack(marks)
    staying, end = _with_line_ends(packed)
    rules = {method.line_ends for method in methods}
    if rules != {"line"} and sight.tiles:
        cut_up = end & _cut_up(session)
        if "none" in rules:
            staying = staying & ~cut_up
        elif "line" not in rules:
            staying = staying | cut_up
    copies = session.copies
    kept = full.visual[::copies].clone()
    if int(kept.sum()) != len(staying):
        raise LayoutError(
            f"The pictures give {len(staying)} features but the prompts hold {int(kept.sum())} "
            "placeholders.",
            advice="Pass pictures only, and the processor's input_ids and pixels together.",
        )
    kept[kept.clone()] = staying
    kept = kept.repeat_interleave(copies, dim=0)
    return Compaction.of(full, full.real & (~full.visual | kept), renumber)


def _wanted(session: Session, choosing: list[int]) -> Bool[Tensor, "T P"] | None:
    """The features that all methods keep; None where none has a say."""
    sight = session.sight
    if sight is None or sight.before is None:
        return None
    left = None if sight.tower is None else sight.tower.features
    if not choosing and left is None:
        return None
    features = sight.before
    alive = torch.ones(features.shape[:2], dtype=torch.bool, device=features.device)
    for i in choosing:
        keep = session.methods[i].visual_tokens(sight.states[i], features)
        if keep is not None:
            alive &= marked(keep, features.shape[1], session.methods[i].label)
    return alive if left is None else alive & left


def _overview(session: Session) -> Float[Tensor, "T P"]:
    """1 on tiles that show a whole picture that is also cut into parts."""
    sight = session.sight
    if sight is None or sight.before is None:
        raise LayoutError("No pictures were encoded.", advice="Pass pixel_values.")
    marks = sight.before.new_zeros(sight.before.shape[:2], dtype=torch.float32)
    first = 0
    for tiles in sight.tiles:
        marks[first : first + (tiles > 1)] = 1
        first += tiles
    return marks


def _cut_up(session: Session) -> Bool[Tensor, " n"]:
    """Where a packed sequence belongs to a picture of several tiles, its line ends included."""
    sight = session.sight
    assert sight is not None
    assert sight.before is not None
    several = [n > 1 for n in sight.tiles for _ in range(n)]
    marks = sight.before.new_tensor(several, dtype=torch.float32)[:, None, None]
    marks = torch.cat([torch.ones_like(marks), marks], -1)
    patch, inside = sight.pack(marks.expand(-1, sight.before.shape[1], -1)).unbind(-1)
    # A line end belongs to the picture of the feature before it.
    index = torch.arange(len(patch), device=patch.device)
    last = torch.where(patch > 0, index, 0).cummax(0).values
    return inside[last] > 0


def _with_line_ends(packed: Float[Tensor, "n 3"]) -> tuple[Bool[Tensor, "n"], Bool[Tensor, "n"]]:
    """What stays of a packed sequence: features of which at least half do, and their line ends.

    Returns:
        What stays, and which of all are line ends.
    """
    stays, patch, overview = packed.unbind(-1)
    end = patch == 0
    stays = ~end & (stays >= 0.5 * patch)
    # A line begins after an end, and where the overview is over.
    begins = functional.pad(
        end[:-1] | ((overview[:-1] > 0) & (overview[1:] <= 0) & ~end[1:]), (1, 0)
    )
    line = begins.long().cumsum(0)
    alive = torch.zeros(int(line[-1]) + 1 if len(line) else 0, device=packed.device)
    alive = alive.index_add(0, line, stays.float())
    return torch.where(end, alive[line] > 0, stays), end


def _keys(cache: Any, config: Any, kind: str, new: int) -> int | None:
    """How many keys the layers of a kind get in a prompt's first pass."""
    return None if cache is None else cache.get_mask_sizes(new, first_layer(config, kind))[0]
