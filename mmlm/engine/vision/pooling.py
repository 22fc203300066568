"""The ``pool`` site: pooled image features enter the decoder, and the originals stay at hand.

A tile's states are pooled before the projector wherever that can take a smaller grid, which then
works on what is left only. Its output is spread out again, each column with the feature of its
cell, so that the model's own packing (unpadding, line ends, tiles of different pictures) and its
placeholders need not know; all columns but one of a cell then leave the prompt before the first
layer, as in :mod:`mmlm.engine.removal.compaction`. What stays is the column at the cell's centre,
in families with positions in several axes with its position.

What entered the projector, and on request what it makes of it, is kept until the methods' ``begin``
has been called: :meth:`Pooling.originals`. It also works for videos, whose frames are tiles.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn

from mmlm.engine.removal.columns import Survivors
from mmlm.engine.vision.cells import spread
from mmlm.engine.vision.originals import Originals, Pictures
from mmlm.engine.vision.patch_rows import PackedRows
from mmlm.engine.vision.placing import Frame, Placing, windows_undone
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["Pooling"]

#: Of :attr:`mmlm.engine.method.Method.line_ends`.
_FEWEST = ("none", "line", "all")


class Pooling:
    """What is pooled in the running prompt, and the originals of it.

    Args:
        session: The attachment.
        users: Numbers of the methods with the site.
    """

    def __init__(self, session: Session, users: list[int]) -> None:
        self.session = session
        self.users = users
        self.seeing: Pictures | None = None  # pictures are in the tower
        self.passes: dict[str, Pictures] = {}  # of the prompt that begins
        self.placing: Placing | None = None
        self._kept: list[Tensor] = []  # bool per feature of each pass
        methods = [session.methods[i] for i in users]
        self.wants_projected = any(m.originals == "projected" for m in methods)
        self.line_ends = min((m.line_ends for m in methods), key=_FEWEST.index)
        family = session.anatomy.family
        self.how = "before" if family.projects_each else str(family.pools)

    # ---- while pictures are encoded ------------------------------------------------------------

    def pooled(
        self,
        pictures: Pictures,
        x: Float[Tensor, "T h w D"],
        side: int,
        there: Bool[Tensor, "T h w"] | None = None,
    ) -> tuple[Float[Tensor, "T a b D"], Bool[Tensor, "T a b"] | None]:
        """The states pooled by the methods, ``x`` itself if none does.

        Args:
            pictures: The pass.
            x: The states.
            side: States along a side that become one feature.
            there: Which states there are; pooling is linear, so that of the others is taken out.

        Returns:
            The smaller grid, and which of its states hold anything.
        """
        if there is not None:
            weight = there[..., None].to(x.dtype)
            some = self.pooled(pictures, x * weight, side)[0]
            share = self.pooled(pictures, weight, side)[0]
            return some / share.clamp(min=1e-6), share[..., 0] > 0
        for i in self.users:
            new = self.session.methods[i].pool(pictures.states[i], x, side)
            x = x if new is None else new
        return x, None

    def before(self, x: Tensor) -> Tensor:
        """What enters the projector, in the place of ``x`` [T, P, D] or [n, D]."""
        pictures = self._seeing()
        pictures.tower, pictures.there = self._restored(x)
        tiles = pictures.tower
        if self.how == "after" or pictures.grids:
            return x
        grid = _grid(tiles.shape[1], self.session.methods, self.users)
        pictures.side = side = self._side(grid)
        whole = (grid[0] // side, grid[1] // side)
        pictures.frames = [Frame(*whole) for _ in range(len(tiles))]
        there = None if pictures.there is None else pictures.there.unflatten(1, grid)
        y, full = self.pooled(pictures, tiles.unflatten(1, grid), side, there)
        if y.shape[1:3] == grid:
            return x
        if y.shape[1] % side or y.shape[2] % side:
            raise LayoutError(
                f"A grid pooled to {y.shape[1]} x {y.shape[2]} states is no whole number of the "
                f"{side} x {side} that become one feature.",
                advice="pool() gets that side.",
            )
        cells = (y.shape[1] // side, y.shape[2] // side)
        pictures.cells = [cells] * len(tiles)
        if full is not None:
            whole_cells = full.unflatten(1, (-1, side)).unflatten(3, (-1, side)).all((2, 4))
            pictures.full = list(whole_cells)
        if self.session.seeing is not None and self.session.seeing.tower is not None:
            self.session.seeing.tower.survivors(tiles.shape[1] // side**2)
        if self.how == "averaged":
            # This projector takes the whole grid and averages squares of it: constant ones.
            small = y.unflatten(1, (-1, side)).unflatten(3, (-1, side)).mean((2, 4))
            y = spread(small, whole).repeat_interleave(side, 1).repeat_interleave(side, 2)
        return y.flatten(1, 2).to(x.dtype)

    def after(self, projector: nn.Module, x: Tensor) -> Tensor:
        """What the projector gives, in the place of ``x`` [T, p, D'] or [n, D']."""
        pictures = self._seeing()
        if pictures.grids:
            return x  # put in order behind the projector first, see `finish`
        tiles = x if x.ndim == 3 else x[None]
        if self.how == "after":
            grid = _grid(tiles.shape[1], self.session.methods, self.users)
            pictures.frames = [Frame(*grid) for _ in range(len(tiles))]
            pictures.projected = tiles
            if pictures.tower is not None:
                pictures.side = math.isqrt(pictures.tower.shape[1] // tiles.shape[1])
            y, _ = self.pooled(pictures, tiles.unflatten(1, grid), 1)
            if y.shape[1:3] == grid:
                return x
            pictures.cells = [(y.shape[1], y.shape[2])] * len(tiles)
            return spread(y, grid).flatten(1, 2).to(x.dtype).view_as(x)
        if pictures.cells is None:
            pictures.projected = tiles
            return x
        if self.wants_projected and pictures.tower is not None:
            pictures.projected = projector.forward(pictures.tower)
        if self.how == "averaged":
            return x
        frame = pictures.frames[0]
        small = tiles.unflatten(1, pictures.cells[0])
        return spread(small, (frame.height, frame.width)).flatten(1, 2)

    def finish(self, pictures: Pictures, output: Any) -> None:
        """Pools features that the model put in order behind the projector."""
        if not pictures.grids:
            return
        parts = list(output.pooler_output)
        left = self._features_left()
        there = None if left is None else left.split([len(part) for part in parts])
        pictures.projected = torch.cat(parts)[None]
        pictures.frames = [
            Frame(height, width, picture=i, number=t)
            for i, (times, height, width) in enumerate(pictures.grids)
            for t in range(times)
        ]
        if pictures.tower is not None:
            ratio = pictures.tower.shape[1] // pictures.projected.shape[1]
            pictures.side = math.isqrt(ratio)
            anatomy, grids, side = self.session.anatomy, pictures.grids, pictures.side
            pictures.tower = windows_undone(anatomy, pictures.tower, grids, side)
            if pictures.there is not None:
                marks = windows_undone(anatomy, pictures.there[..., None], grids, side)
                pictures.there = marks[..., 0]
        pooled = [self._one(pictures, x, i, there) for i, x in enumerate(parts)]
        cells = [shape for _, shapes, _ in pooled for shape in shapes]
        if all((f.height, f.width) == c for f, c in zip(pictures.frames, cells, strict=True)):
            return
        pictures.cells = cells
        if there is not None:
            pictures.full = [full for _, _, some in pooled for full in some]
        output.pooler_output = [x for x, _, _ in pooled]
        if getattr(output, "deepstack_features", None) is not None:
            output.deepstack_features = [
                [self._one(pictures, x, i, there)[0] for i, x in enumerate(level)]
                for level in output.deepstack_features
            ]

    def _one(
        self, pictures: Pictures, x: Tensor, i: int, there: Sequence[Tensor] | None
    ) -> tuple[Tensor, list[tuple[int, int]], list[Tensor]]:
        """Features [n, D] of one picture, the grid of each frame, and which cells hold anything."""
        times, height, width = pictures.grids[i]
        marks = None if there is None else there[i].view(times, height, width)
        y, full = self.pooled(pictures, x.view(times, height, width, -1), 1, marks)
        cells = [(y.shape[1], y.shape[2])] * times
        if y.shape[1:3] != (height, width):
            x = spread(y, (height, width)).flatten(0, 2).to(x.dtype)
        return x, cells, [] if full is None else list(full)

    def _restored(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """States [T, P, D] of all places, and which of them did not leave the tower."""
        tower = None if self.session.seeing is None else self.session.seeing.tower
        tiles = x if x.ndim == 3 else x[None]
        if tower is None or not tower.cut or tower.rows is None:
            return tiles, None
        rows = tower.rows
        if isinstance(rows, PackedRows):
            full = x.new_zeros(rows.length, x.shape[-1]).index_copy(0, rows.flat, x)
            marks = torch.zeros(rows.length, dtype=torch.bool, device=x.device)
            return full[None], marks.index_fill(0, rows.flat, True)[None]
        alive = rows.alive()
        if alive.shape[1] != tiles.shape[1]:
            raise LayoutError(
                f"{alive.shape[1]} patches per tile leave the tower as {tiles.shape[1]} states.",
                advice="Pooling beside methods that take patches out of the tower cannot run here.",
            )
        return tiles, alive

    def _features_left(self) -> Bool[Tensor, "n"] | None:
        """Which features of a packed sequence are left; None if all are."""
        tower = None if self.session.sight is None else self.session.sight.tower
        return None if tower is None or tower.features is None else tower.features.flatten()

    def _side(self, grid: tuple[int, int]) -> int:
        """Patches along a side that this projector merges into one feature."""
        anatomy = self.session.anatomy
        if self.how == "shuffled":
            return int(anatomy.config.scale_factor)
        if self.how == "averaged":
            return grid[0] // math.isqrt(anatomy.config.mm_tokens_per_image)
        return 1

    def _seeing(self) -> Pictures:
        if self.seeing is None:
            raise LayoutError("No pictures are being encoded.", advice="Call generate() first.")
        return self.seeing

    # ---- when the prompt begins ----------------------------------------------------------------

    def alive(self, kept: Mapping[str, Tensor | None]) -> Bool[Tensor, "B N"] | None:
        """Which columns of the whole prompt go on; None if all do.

        Args:
            kept: Features that methods of the site ``visual_tokens`` keep, by modality.
        """
        session = self.session
        self.placing = None
        if not self.passes:
            return None
        self.placing = Placing(session, self.passes)
        self._kept = []
        for modality, pictures in self.passes.items():
            marks = kept.get(modality)
            count = sum(f.height * f.width for f in pictures.frames)
            device = session.layout.seg.device
            whole = torch.ones(count, dtype=torch.bool, device=device)
            self._kept.append(whole if marks is None else marks.flatten())
        if all(pictures.cells is None for pictures in self.passes.values()):
            return None
        return self.placing.staying(self.line_ends)

    def originals(self, kind: str, survivors: Survivors | None) -> Originals | None:
        """The unpooled states of the prompt that begins, None without pictures.

        Args:
            kind: "tower" (what entered the projector) or "projected" (what it makes of that).
            survivors: The columns that went on; None: all.

        Raises:
            LayoutError: If the projector was given something else than one tensor of states.
        """
        if not self.passes or self.placing is None:
            return None
        found = [self._of_pass(kind, m, i) for i, m in enumerate(self.passes)]
        copies = self.session.copies
        at, start = self.placing.at, self.placing.start
        row = self.placing.row
        if survivors is not None:
            index, valid = survivors.index[::copies], survivors.valid[::copies]
            at = at.gather(1, index).masked_fill(~valid, -1)
            later = valid[row] & (index[row] >= start[:, None])
            start = index.shape[1] - later.sum(-1)
        states = torch.cat([s for s, _, _, _ in found])
        frame = torch.cat([f for _, f, _, _ in found])
        return Originals(
            states=states,
            row=row[frame],
            picture=self.placing.picture[frame],
            frame=frame,
            number=self.placing.number[frame],
            start=start[frame],
            kept=torch.cat([k for _, _, k, _ in found]),
            where=torch.cat([w for _, _, _, w in found]),
            at=at,
            picture_of=self.placing.picture,
            start_of=start,
            video=self.placing.video,
            rows=at.shape[0],
        )

    def _of_pass(self, kind: str, modality: str, i: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """States, frames, which are kept, and places in the frame, of one pass."""
        pictures = self.passes[modality]
        states = pictures.tower if kind == "tower" else pictures.projected
        if states is None:
            raise LayoutError(
                f"The {kind} states of the pictures are not known: the projector of this model "
                "gets more than one tensor of states.",
                advice="Use kv_source='projected'." if kind == "tower" else "Use another model.",
            )
        side = pictures.side if kind == "tower" else 1
        device = states.device
        frames, places = [], []
        for number, frame in enumerate(pictures.frames):
            size = frame.height * frame.width * side**2
            frames.append(torch.full((size,), self.placing_first(modality) + number, device=device))
            places.append(frame.places(side, bool(pictures.grids), device))
        kept = self._kept[i].to(device)
        if side > 1:
            kept = torch.cat(
                [
                    frame.finer(part, side, bool(pictures.grids))
                    for frame, part in zip(
                        pictures.frames, kept.split([f.size for f in pictures.frames]), strict=True
                    )
                ]
            )
        if pictures.there is not None and kind == "tower":
            kept = kept & pictures.there.flatten()
        return states.flatten(0, 1), torch.cat(frames), kept, torch.cat(places)

    def placing_first(self, modality: str) -> int:
        """Number of the first frame of a modality."""
        names = list(self.passes)[: list(self.passes).index(modality)]
        return sum(len(self.passes[name].frames) for name in names)

    def only(self, given: Mapping[str, Any]) -> None:
        """Forgets pictures that are not part of the prompt that begins."""
        self.passes = {m: p for m, p in self.passes.items() if given.get(m) is not None}

    def forget(self) -> None:
        """The prompt has begun, or is over."""
        self.passes, self.placing, self._kept = {}, None, []


def _grid(count: int, methods: Any, users: list[int]) -> tuple[int, int]:
    """Height and width of a tile of ``count`` states.

    Raises:
        LayoutError: If that is no square and no method says what it is.
    """
    for i in users:
        given = methods[i].source_grid
        if given is not None:
            if given[0] * given[1] != count:
                raise LayoutError(
                    f"{methods[i].label}: a tile has {count} states, not {given[0]} x {given[1]}.",
                    advice="Leave the grid out, or give the true one.",
                )
            return given
    side = math.isqrt(count)
    if side * side != count:
        names = ", ".join(methods[i].label for i in users)
        raise LayoutError(
            f"{names}: a tile has {count} states, which is no square grid.",
            advice="Say the grid: source_grid=(height, width).",
        )
    return side, side
