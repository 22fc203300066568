"""What CrossLMM keeps of a prompt, who sees which originals, and one block at some columns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from mmlm.engine.method import Prompt
from mmlm.engine.vision.originals import Originals
from mmlm.errors import LayoutError
from mmlm.methods import cross_blocks
from mmlm.methods.cross_blocks import CrossAttention, CrossBlocks, Store

__all__ = ["State", "lay_out", "looked", "seen_by_text", "seen_by_visual"]


@dataclass(eq=False)
class State:
    """What is kept for one prompt.

    Attributes:
        prompt: The running prompt.
        blocks: The method's weights.
        z: States of the originals [R, O, E], row by row; None once they are not needed any more.
        keys: bool [R, O]; which of those columns hold an original that counts.
        number: int64 [R, O]; number of the frame within its picture.
        frame: int64 [R, O]; number of the frame.
        picture: int64 [R, O]; number of the picture.
        start: int64 [R, O]; where the frame's placeholders begin.
        at: int64 [R, N]; frame at each column of the prompt, -1 for none.
        originals: Facts about the frames.
        whole: Whether all columns of ``keys`` count.
        alone: Whether no row has more than one picture.
        still: Whether no frame belongs to a video.
        level: Whether all frames of a row begin at one column.
        groups: For a pooled store: group of each original.
        stores: Keys and values of each layer, for later passes.
    """

    prompt: Prompt
    blocks: CrossBlocks
    z: Tensor | None
    keys: Tensor
    number: Tensor
    frame: Tensor
    picture: Tensor
    start: Tensor
    at: Tensor
    originals: Originals
    whole: bool
    alone: bool
    still: bool
    level: bool
    groups: Tensor | None = None
    stores: dict[int, Store] = field(default_factory=dict)


def lay_out(
    prompt: Prompt, blocks: CrossBlocks, found: Originals, cache: str, *, numbered: bool
) -> State:
    """Lays the originals of each row side by side.

    Args:
        prompt: The prompt that begins.
        blocks: The method's weights.
        found: The originals of all rows.
        cache: What later tokens read: "full", "fp8" or "pooled:n".
        numbered: Whether frames are told apart by their numbers.

    Raises:
        LayoutError: If there are more frames than numbers.
    """
    index, valid = by_row(found.row, found.rows)
    if numbered and int(found.number.max()) >= cross_blocks.FRAMES:
        raise LayoutError(
            f"CrossLMM: a video has {int(found.number.max()) + 1} frames; temporal_pos knows "
            f"{cross_blocks.FRAMES}.",
            advice="Use fewer frames, or temporal_pos=False.",
        )
    keys = valid & found.kept[index]
    picture, start = found.picture[index], found.start[index]
    state = State(
        prompt=prompt,
        blocks=blocks,
        z=found.states[index] * valid[..., None].to(found.states.dtype),
        keys=keys,
        number=found.number[index],
        frame=found.frame[index],
        picture=picture,
        start=start,
        at=found.at,
        originals=found,
        whole=bool(keys.all()),
        alone=level(picture, valid),
        still=not bool(found.video.any()),
        level=level(start, valid),
    )
    kind, _, side = cache.partition(":")
    if kind == "pooled":
        state.groups = groups_of(state.frame, found.where[index], int(side), valid)
    return state


def seen_by_visual(
    state: State, place: Int[Tensor, "B n"], scope: str
) -> Bool[Tensor, "B n O"] | None:
    """Which originals each pooled token sees; None: all of its row.

    Args:
        state: Of the prompt.
        place: Columns of the pooled tokens.
        scope: "own", "video" or "all", see :class:`mmlm.methods.crosslmm.CrossLMM`.
    """
    if state.alone and (scope != "own" or state.still):
        return None
    found, copies = state.originals, place.shape[0] // state.at.shape[0]

    def rows(t: Tensor) -> Tensor:
        return t.repeat_interleave(copies, 0) if copies > 1 else t

    frame = rows(state.at).gather(1, place)
    of, known = frame.clamp(min=0), (frame >= 0)[..., None]
    if scope == "all":
        return known & (rows(state.start)[:, None] <= place[..., None])
    seen = rows(state.picture)[:, None] == found.picture_of[of][..., None]
    if scope == "own":
        own = rows(state.frame)[:, None] == of[..., None]
        seen = torch.where(found.video[of][..., None], own, seen)
    return known & seen


def seen_by_text(
    state: State, place: Int[Tensor, "B n"]
) -> Bool[Tensor, "B n O"] | Bool[Tensor, "B n 1"]:
    """Which originals each text position sees; [B, n, 1] where it is all of its row or none."""
    copies = place.shape[0] // state.at.shape[0]
    start = state.start.repeat_interleave(copies, 0) if copies > 1 else state.start
    if state.level:
        start = start[:, :1]
    return start[:, None] <= place[..., None]


def looked(
    block: nn.Module,
    state: State,
    x: Tensor,
    who: Bool[Tensor, "B L"],
    place: Int[Tensor, "B L"],
    seen_by: Callable[[State, Tensor], Tensor | None],
    keep: Callable[[State, Tensor, Tensor], None] | None = None,
) -> Tensor | None:
    """What one block adds at the columns ``who``, zeros elsewhere; None where there are none.

    Args:
        block: The block.
        state: Of the prompt.
        x: The residual stream [B, L, D].
        who: Its columns that look.
        place: Where they stand in the prompt.
        seen_by: Which originals the columns at some places see.
        keep: Gets the keys and values.
    """
    assert state.z is not None
    assert isinstance(block, CrossAttention)
    k, v = block.keys_values(state.z, state.number)
    if keep is not None:
        keep(state, k, v)
    n = int(who.sum(-1).max())
    if n == 0:
        return None
    index = who.long().argsort(dim=1, descending=True, stable=True)[:, :n]
    valid = who.gather(1, index)
    seen = seen_by(state, place.gather(1, index))
    rows = None
    if seen is not None and seen.shape[-1] == 1:
        valid = valid & seen[..., 0]
    else:
        rows = seen
    wide = index[..., None].expand(-1, -1, x.shape[-1])
    y = block(x.gather(1, wide), k, v, None if state.whole else state.keys, rows)
    y = y.masked_fill(~valid[..., None], 0)
    return torch.zeros_like(x).scatter_add(1, wide, y.to(x.dtype))


def by_row(row: Int[Tensor, "n"], rows: int) -> tuple[Int[Tensor, "R O"], Bool[Tensor, "R O"]]:
    """Numbers of the originals of each row, and which of them are there."""
    count = torch.bincount(row, minlength=rows)
    most = int(count.max())
    column = torch.arange(most, device=row.device)
    order = row.argsort(stable=True)
    first = count.cumsum(0) - count
    valid = column < count[:, None]
    index = (first[:, None] + column).clamp(max=len(row) - 1)
    return order[index], valid


def level(values: Int[Tensor, "R O"], valid: Bool[Tensor, "R O"]) -> bool:
    """Whether each row has one value where it is valid."""
    return bool((~valid | (values == values[:, :1])).all())


def groups_of(
    frame: Int[Tensor, "R O"],
    where: Float[Tensor, "R O 2"],
    side: int,
    valid: Bool[Tensor, "R O"],
) -> Int[Tensor, "R O"]:
    """The cell of each original, numbered within its row."""
    cell = (where * side).long().clamp(max=side - 1)
    first = torch.where(valid, frame, frame.max()).amin(-1, keepdim=True)
    number = ((frame - first) * side + cell[..., 0]) * side + cell[..., 1]
    return torch.where(valid, number, 0)
