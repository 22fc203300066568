"""Where the features of a prompt's pictures and videos stand in it, frame by frame.

A frame is one grid of features: a picture, a tile of one, or a frame of a video. Features stand in
the order of the placeholders, or are packed by the model's own function, through which marks are
sent (see :mod:`mmlm.engine.vision.sight`).
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mmlm.engine.vision.cells import central, closeness, spread
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.session import Session
    from mmlm.engine.vision.originals import Pictures

__all__ = ["Frame", "Placing", "windows_undone"]


@dataclass(frozen=True)
class Frame:
    """One grid of features.

    Attributes:
        height: Features down.
        width: Features across.
        picture: Number of the picture or video in its pass, where the caller's grids say it.
        number: Number of the frame in that.
    """

    height: int
    width: int
    picture: int = 0
    number: int = 0

    @property
    def size(self) -> int:
        """Number of features."""
        return self.height * self.width

    @functools.lru_cache(maxsize=256)  # noqa: B019  (frames are values; tiles are all alike)
    def places(self, side: int, blocks: bool, device: torch.device) -> Float[Tensor, "n 2"]:
        """Where each state stands in the frame, down and across, in [0, 1).

        Args:
            side: States along a side that become one feature.
            blocks: Whether the states of one feature stand together; else line by line.
            device: Of the result.
        """
        down = (torch.arange(self.height * side, device=device) + 0.5) / (self.height * side)
        across = (torch.arange(self.width * side, device=device) + 0.5) / (self.width * side)
        grid = torch.stack(torch.meshgrid(down, across, indexing="ij"), -1)
        return self._ordered(grid, side, blocks)

    def finer(self, marks: Tensor, side: int, blocks: bool) -> Tensor:
        """Marks on features as marks on the states that they are made of."""
        grid = marks.view(self.height, self.width)
        grid = grid.repeat_interleave(side, 0).repeat_interleave(side, 1)
        return self._ordered(grid, side, blocks)

    def _ordered(self, grid: Tensor, side: int, blocks: bool) -> Tensor:
        if blocks and side > 1:
            grid = grid.unflatten(1, (self.width, side)).unflatten(0, (self.height, side))
            return grid.transpose(1, 2).flatten(0, 3)
        return grid.flatten(0, 1)


class Placing:
    """Rows, pictures and columns of all frames of a prompt.

    Args:
        session: The attachment; the prompt's whole layout has been read.
        passes: The pictures by modality.

    Attributes:
        row: int64 [frames]; row of each frame, before rows are repeated for beams.
        picture: int64 [frames]; number of its picture.
        number: int64 [frames]; its number in that.
        start: int64 [frames]; column at which its placeholders begin.
        video: bool [frames]; whether it belongs to a video.
        at: int64 [rows, N]; number of the frame at each column, -1 for none.

    Raises:
        LayoutError: If features and placeholders disagree.
    """

    def __init__(self, session: Session, passes: Mapping[str, Pictures]) -> None:
        self.session = session
        self.passes = passes
        self._full = session.layout
        self._visual = self._full.visual[:: session.copies]
        device = self._visual.device
        self.at = torch.full(self._visual.shape, -1, dtype=torch.long, device=device)
        self.row, self.picture, self.number, self.start = (
            torch.zeros(0, dtype=torch.long, device=device) for _ in range(4)
        )
        self.video = torch.zeros(0, dtype=torch.bool, device=device)
        self._packed: dict[str, Tensor] = {}
        self._mine: dict[str, Tensor] = {}
        for modality, pictures in passes.items():
            self._mine[modality] = self._columns(modality)
            if pictures.pack is None:
                self._in_order(modality, pictures)
            else:
                self._by_packing(modality, pictures)

    def _columns(self, modality: str) -> Bool[Tensor, "b N"]:
        """The placeholders of one modality."""
        if len(self.passes) == 1:
            return self._visual
        config, source = self.session.anatomy.config, self.session.source
        if source is None or source.input_ids is None:
            raise LayoutError("Pictures beside videos need input_ids.", advice="Pass token ids.")
        video = source.input_ids[:: self.session.copies] == config.video_token_id
        return self._visual & (video if modality == "video" else ~video)

    def _check(self, modality: str, count: int) -> None:
        expected = int(self._mine[modality].sum())
        if count != expected:
            raise LayoutError(
                f"The {modality}s give {count} features, but the prompts hold {expected} "
                "placeholders.",
                advice="Pass the processor's input_ids and pixel inputs together.",
            )

    def _add(self, modality: str, row: Tensor, picture: Tensor, start: Tensor) -> None:
        """Adds frames; ``picture`` numbers those of this modality from 0."""
        first = int(self.picture.max()) + 1 if len(self.picture) else 0
        begins = torch.ones_like(picture, dtype=torch.bool)
        begins[1:] = picture[1:] != picture[:-1]
        index = torch.arange(len(picture), device=picture.device)
        number = index - torch.where(begins, index, 0).cummax(0).values
        self.row = torch.cat([self.row, row])
        self.picture = torch.cat([self.picture, picture + first])
        self.number = torch.cat([self.number, number])
        self.start = torch.cat([self.start, start])
        self.video = torch.cat([self.video, torch.full_like(begins, modality == "video")])

    def _in_order(self, modality: str, pictures: Pictures) -> None:
        """Feature after feature at placeholder after placeholder."""
        sizes = torch.tensor([f.size for f in pictures.frames], device=self.at.device)
        self._check(modality, int(sizes.sum()))
        mine, first = self._mine[modality], len(self.row)
        frame = torch.arange(len(sizes), device=sizes.device).repeat_interleave(sizes)
        self.at[mine] = first + frame
        rows, columns = mine.nonzero(as_tuple=True)
        begins = sizes.cumsum(0) - sizes
        row, start = rows[begins], columns[begins]
        if pictures.grids:
            picture = torch.tensor([f.picture for f in pictures.frames], device=sizes.device)
        else:  # tiles of one image stand in one block, or in blocks that the layout counts as one
            image = self._full.img[:: self.session.copies][row, start].long()
            key = row * (int(image.max()) + 1) + image
            changed = torch.zeros_like(key)
            changed[1:] = (key[1:] != key[:-1]).long()
            picture = changed.cumsum(0)
        self._add(modality, row, picture, start)

    def _by_packing(self, modality: str, pictures: Pictures) -> None:
        """Through the model's own packing function, on marks."""
        frame = pictures.frames[0]
        tiles, device = len(pictures.frames), self.at.device
        number = torch.arange(1, tiles + 1, device=device, dtype=torch.float32)
        overview = torch.zeros(tiles, device=device)
        first = 0
        for count in pictures.tiles:
            overview[first : first + int(count > 1 and modality == "image")] = 1
            first += count
        marks = [number, overview, torch.ones(tiles, device=device)]
        dense = torch.stack(marks, -1)[:, None].expand(-1, frame.size, -1)
        if pictures.cells is not None:
            near = closeness((frame.height, frame.width), pictures.cells[0], device)
            near = near.expand(tiles, -1, -1)
            if pictures.full is not None:
                near = near * torch.stack(pictures.full).flatten(1)[:, None]
            dense = torch.cat([dense, near], dim=-1)
        assert pictures.pack is not None
        parts = pictures.pack(dense.contiguous())
        sizes = torch.tensor([len(part) for part in parts], device=device)
        packed = torch.cat(parts)
        self._check(modality, len(packed))
        self._packed[modality] = packed
        mine = self._mine[modality]
        rows, columns = mine.nonzero(as_tuple=True)
        begins = sizes.cumsum(0) - sizes
        own = torch.arange(len(sizes), device=device)
        picture = own.repeat_interleave(torch.tensor(pictures.tiles, device=device))
        # Line ends belong to the frame before them.
        index = torch.arange(len(packed), device=device)
        last = torch.where(packed[:, 2] > 0, index, 0).cummax(0).values
        exact = (packed[last, 0] / packed[last, 2].clamp(min=1e-6)).round().long() - 1
        self.at[mine] = len(self.row) + exact.clamp(0, tiles - 1)
        self._add(modality, rows[begins][picture], picture, columns[begins][picture])

    def staying(self, line_ends: str) -> Bool[Tensor, "B N"]:
        """The columns of the whole prompt that go on: one of each cell, and all text.

        Args:
            line_ends: Which ends of lines stay, see :attr:`mmlm.engine.method.Method.line_ends`.
        """
        alive = ~self._visual
        for modality, pictures in self.passes.items():
            mine = self._mine[modality]
            cells = pictures.cells
            if cells is None:
                stays = torch.ones(int(mine.sum()), dtype=torch.bool, device=mine.device)
            elif pictures.pack is None:
                each = zip(pictures.frames, cells, strict=True)
                flags = [central((f.height, f.width), c, mine.device) for f, c in each]
                if pictures.full is not None:
                    flags = [
                        flag & spread(full[None, ..., None], (f.height, f.width))[0, ..., 0]
                        for f, flag, full in zip(pictures.frames, flags, pictures.full, strict=True)
                    ]
                stays = torch.cat([flag.flatten() for flag in flags])
            else:
                stays = self._nearest(self._packed[modality], len(pictures.frames), line_ends)
            alive[mine] = stays
        alive = alive.repeat_interleave(self.session.copies, dim=0)
        return alive & self._full.real

    def _nearest(self, packed: Tensor, tiles: int, line_ends: str) -> Bool[Tensor, "n"]:
        """Of each cell of each tile the position that is nearest to its centre."""
        from mmlm.engine.removal.compaction import _with_line_ends

        near = packed[:, 3:]
        n, cells = near.shape
        own = packed[:, 0].round()
        true = (packed[:, 0] - own).abs() < 1e-3
        tile = (own.long() - 1).clamp(0, tiles - 1)
        near = torch.where((true & (packed[:, 2] > 0.5))[:, None], near, 0)
        key = (tile[:, None] * cells + torch.arange(cells, device=near.device)).flatten()
        flat = near.flatten()
        best = flat.new_zeros(tiles * cells).scatter_reduce(0, key, flat, "amax")
        where = torch.arange(n, device=near.device).repeat_interleave(cells)
        where = torch.where((flat > 0) & (flat >= best[key]), where, n)
        first = where.new_full((tiles * cells,), n).scatter_reduce(0, key, where, "amin")
        stays = torch.zeros(n + 1, dtype=torch.bool, device=near.device)
        stays[first] = True
        stays = stays[:n]
        if line_ends == "none":
            return stays
        if line_ends == "all":
            return stays | (packed[:, 2] == 0)
        marks = torch.stack([stays.float(), packed[:, 2].clamp(max=1), packed[:, 1]], -1)
        return _with_line_ends(marks)[0]


def windows_undone(
    anatomy: Anatomy, x: Float[Tensor, "1 n D"], grids: list[tuple[int, int, int]], side: int
) -> Float[Tensor, "1 n D"]:
    """Tower states in the order of the features, where a tower sorts them by its windows."""
    tower: Any = anatomy.tower
    if not anatomy.tower_windows:
        return x
    from transformers.vision_utils import get_vision_window_index

    grid = torch.tensor([(t, h * side, w * side) for t, h, w in grids])
    index, _ = get_vision_window_index(grid, side, tower.window_size, tower.patch_size)
    blocks = x.unflatten(1, (-1, side * side))
    return blocks[:, index.argsort().to(x.device)].flatten(1, 2)
