"""One pass of pictures through a vision tower that may lose patches on the way.

What it holds: which patches are there, which features are left in the end, and the states of all
places that later code of the model reads. Who hooks the tower is
:mod:`mmlm.engine.vision.tower_pruning`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mmlm.engine.removal.columns import Survivors, marked
from mmlm.engine.vision.patch_look import PatchLook
from mmlm.engine.vision.patch_rows import PackedRows, TileRows
from mmlm.engine.vision.tower import feature_blocks
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session
    from mmlm.engine.vision.sight import Sight

__all__ = ["TowerPass", "kept_by_row"]


class TowerPass:
    """One pass of pictures through a tower that may lose patches.

    Args:
        session: The attachment.
        sight: The pass of pictures that this is part of; it has the methods' states.
        pictures: The picture of each tile, where several tiles make one picture; for messages.
        grid: Patches of each picture in time, height and width, where the tower is told.
    """

    def __init__(
        self, session: Session, sight: Sight, pictures: list[int] | None, grid: Tensor | None
    ) -> None:
        self.session, self.sight, self.pictures, self.grid = session, sight, pictures, grid
        self.unit = session.anatomy.patches_per_feature
        self.rows: TileRows | PackedRows | None = None
        self.caught: dict[str, Any] = {}
        self.restored: dict[int, Tensor] = {}  # outputs of the blocks that make the features
        self.width = 0  # features of a tile before any left, once the projector has run
        self.features: Tensor | None = None  # bool [T, p]: which of them are left
        self.chosen: Survivors | None = None  # while the projector runs

    @property
    def cut(self) -> bool:
        """Whether any patch has left."""
        return self.rows is not None and self.rows.cut_once

    def enter(self, x: Tensor, mask: Any) -> None:
        """Pictures enter the first block."""
        first = int(self.session.anatomy.tower_has_cls)
        if x.ndim == 2:
            if self.grid is None:
                raise LayoutError(
                    "Pictures are packed into one sequence, but their grids are missing.",
                    advice="Pass the processor's grids (image_grid_thw).",
                )
            self.rows = PackedRows(x, self.grid.prod(-1).tolist())
        else:
            self.rows = TileRows(x, first, _seen(mask))

    def look(self) -> PatchLook:
        """What stands in the block that has run."""
        rows = self.rows
        assert rows is not None
        return PatchLook(rows, self.caught, self.session.anatomy, self._refuse_non_finite)

    @torch.no_grad()
    def ask(self, block: int, users: list[int], x: Tensor) -> Bool[Tensor, "T n"] | None:
        """Which columns the methods keep; None if all.

        Raises:
            LayoutError: If a tile would lose all its patches.
        """
        rows, methods, sight = self.rows, self.session.methods, self.sight
        assert rows is not None
        look, alive = self.look(), rows.valid
        for i in users:
            keep = methods[i].patches(sight.states[i], block, x if x.ndim == 3 else x[None], look)
            if keep is not None:
                alive = alive & marked(keep, alive.shape[1], methods[i].label)
        if alive is rows.valid or bool((alive == rows.valid).all()):
            return None
        if not bool(alive.any(-1).all()):
            names = " + ".join(methods[i].label for i in users)
            raise LayoutError(f"{names} leaves no patch of a tile.", advice="Keep at least one.")
        return alive

    def finish_block(self, block: int, users: list[int], x: Tensor) -> Tensor:
        """The output of a block without the patches that leave behind it."""
        alive = self.ask(block, users, x) if users else None
        rows = self.rows
        assert rows is not None
        if alive is not None:
            x = rows.cut(x, alive)
        self.caught.clear()
        if rows.cut_once and isinstance(rows, TileRows):
            if block in feature_blocks(self.session.anatomy):
                self._refuse_non_finite(x)
                self.restored[block] = rows.restored(x)
        return x

    def restore(self, output: Any) -> None:
        """Puts states of all places into what the tower returns, 0 where a patch has left."""
        rows = self.rows
        if not self.cut or not isinstance(rows, TileRows):
            return
        last = getattr(output, "last_hidden_state", None)
        if last is not None and last.shape[1] == rows.numbers.shape[1] + rows.first:
            output.last_hidden_state = rows.restored(last)
        states = getattr(output, "hidden_states", None)
        if states is not None:
            changed = list(states)
            for block, full in self.restored.items():
                if block + 1 < len(changed):
                    changed[block + 1] = full
            output.hidden_states = tuple(changed)

    # ---- features ------------------------------------------------------------------------------

    def survivors(self, width: int) -> Survivors:
        """The features [T, width] that are left, of tiles.

        Raises:
            LayoutError: If parts of features are left, or their number is none that fits.
        """
        rows = self.rows
        assert isinstance(rows, TileRows)
        alive = rows.alive()
        if self.unit > 1:
            of = self.session.anatomy.feature_of_patch(
                torch.arange(rows.count, device=alive.device), rows.count
            )
            counts = torch.zeros(rows.tiles, rows.count // self.unit, device=alive.device)
            counts = counts.index_add(1, of, alive.float())
            alive = counts > 0
            if bool((counts[alive] != self.unit).any()):
                raise LayoutError(
                    f"A method keeps parts of image features, which are made of {self.unit} "
                    "patches each.",
                    advice="Keep whole units.",
                )
        elif width == rows.count + rows.first:  # the class token is a feature too
            alive = torch.cat([alive.new_ones(rows.tiles, rows.first), alive], dim=1)
        if alive.shape[1] != width:
            raise LayoutError(
                f"{rows.count} patches per tile become {width} features, not {alive.shape[1]}.",
                advice="Methods that select patches cannot run on this model.",
            )
        self.features, self.width = alive, width
        return Survivors.of(alive)

    def merged(self, y: Float[Tensor, "u D"], fill: float) -> Float[Tensor, "U D"]:
        """Features of a packed sequence at their places, ``fill`` where one has left."""
        rows = self.rows
        assert isinstance(rows, PackedRows)
        full = y.new_full((rows.length // self.unit, y.shape[-1]), fill)
        return full.index_copy(0, rows.features(self.unit), y)

    def settle(self, output: Any) -> Any:
        """Notes which features are left of what the encoder returned, and makes the others 0."""
        rows = self.rows
        self.restored.clear()
        if not self.cut or not isinstance(rows, PackedRows):
            return output
        parts = output.pooler_output
        alive = [~part.detach().isnan().all(-1) for part in parts]
        left = torch.stack([part.sum() for part in alive])
        expected = rows.valid.sum(-1) // self.unit
        if bool((left != expected).any()):
            self._refuse_non_finite(torch.stack([p.detach().sum() for p in parts])[:, None], True)
        zero = parts[0].new_zeros(())
        new = [torch.where(a[:, None], p, zero) for a, p in zip(alive, parts, strict=True)]
        output.pooler_output = type(parts)(new) if not isinstance(parts, Tensor) else new
        self.features = torch.cat(alive)[None]
        return output

    def owners(self, features: Float[Tensor, "T p D"]) -> Int[Tensor, "T p"]:
        """The tile, or in a packed sequence the picture, of every feature."""
        rows = self.rows
        assert rows is not None
        if isinstance(rows, TileRows):
            tiles = torch.arange(rows.tiles, device=features.device)
            return tiles[:, None].expand(-1, features.shape[1])
        sizes = torch.tensor([n // self.unit for n in rows.sizes], device=features.device)
        return torch.arange(rows.tiles, device=features.device).repeat_interleave(sizes)[None]

    def numbers(self) -> list[list[int]]:
        """Numbers of the patches that are left of each tile, as the processor orders them."""
        rows, features = self.rows, self.features
        assert rows is not None
        if isinstance(rows, TileRows) or not self.session.anatomy.tower_windows:
            return [row[row >= 0].tolist() for row in rows.numbers]
        if features is None:
            return [list(range(n)) for n in rows.sizes]
        found, begin = [], 0
        for n in rows.sizes:
            units = features[0, begin : begin + n // self.unit].nonzero().flatten().tolist()
            found.append([u * self.unit + i for u in units for i in range(self.unit)])
            begin += n // self.unit
        return found

    def _refuse_non_finite(self, values: Tensor, certain: bool = False) -> None:
        """Raises if a tile's values [T, ...] are no finite numbers."""
        rows = self.rows
        assert rows is not None
        bad = ~values.flatten(1).isfinite().all(-1)
        if not bool(bad.any()) and not certain:
            return
        tile = int(bad.long().argmax())
        image = tile if self.pictures is None else self.pictures[tile]
        raise FloatingPointError(
            f"States of image {image} of the batch (tile {tile}) in the vision tower are not "
            "finite, so its patches cannot be chosen. Check its pixels, or use a wider precision."
        )


def kept_by_row(
    tower: TowerPass, owners: Float[Tensor, " n"], visual: Bool[Tensor, "B N"], copies: int
) -> list[list[list[int]]]:
    """Numbers of the patches that are left, for each row of a prompt, for each of its tiles.

    Args:
        tower: The pass of the prompt's pictures.
        owners: 1 + the tile of every feature, in the order of the sequence; 0 at line ends.
        visual: The prompt's visual positions before any left.
        copies: How often each row stands in the batch (beams).
    """
    numbers, row_of = tower.numbers(), visual.nonzero()[:, 0]
    found: list[list[list[int]]] = []
    for row in range(visual.shape[0]):
        own = owners[row_of == row]
        # Where features are resized, marks between two tiles are no whole numbers.
        tiles = own[(own > 0) & (own == own.round())].unique().long() - 1
        found += [[numbers[tile] for tile in tiles.tolist()]] * copies
    return found


def _seen(mask: Any) -> Tensor | None:
    """Bool [T, S]: tokens that are no padding, from the mask that a tower gives its blocks."""
    if not isinstance(mask, Tensor):
        return None
    if mask.ndim == 4:
        mask = mask[:, 0, 0]
    return mask if mask.dtype == torch.bool else mask >= 0 if mask.is_floating_point() else mask > 0
