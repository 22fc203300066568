"""Pictures on their way to the decoder, and their unpooled states, frame by frame."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxtyping import Bool, Float, Int
from torch import Tensor

if TYPE_CHECKING:
    from mmlm.engine.vision.placing import Frame

__all__ = ["Originals", "Pictures"]


@dataclass(frozen=True, eq=False)
class Originals:
    """The unpooled image states of a prompt's pictures.

    Attributes:
        states: [n, D] of all rows, row after row.
        row: int64 [n]; the row of the prompt, before rows are repeated for beams.
        picture: int64 [n]; number of the picture or video, over all rows.
        frame: int64 [n]; number of the tile or frame, over all rows.
        number: int64 [n]; number of the tile or frame within its picture.
        start: int64 [n]; column of the layout at which the frame's placeholders begin.
        kept: bool [n]; False where a method chose another feature (``visual_tokens``).
        where: [n, 2]; place in the tile, down and across, in [0, 1).
        at: int64 [rows, N]; number of the frame whose feature stands at a column, -1 for none.
        picture_of: int64 [frames]; picture of each frame.
        start_of: int64 [frames]; first column of each frame.
        video: Whether frames are those of videos.
        rows: Number of rows before they are repeated.
    """

    states: Float[Tensor, "n D"]
    row: Int[Tensor, "n"]
    picture: Int[Tensor, "n"]
    frame: Int[Tensor, "n"]
    number: Int[Tensor, "n"]
    start: Int[Tensor, "n"]
    kept: Bool[Tensor, "n"]
    where: Float[Tensor, "n 2"]
    at: Int[Tensor, "b N"]
    picture_of: Int[Tensor, "f"]
    start_of: Int[Tensor, "f"]
    video: Bool[Tensor, "f"]
    rows: int


@dataclass(eq=False)
class Pictures:
    """One pass of pictures or videos through tower and projector.

    Attributes:
        modality: "image" or "video".
        grids: (frames, height, width) of each picture's features, where the caller says them and
            all pictures come in one row; else empty.
        states: State of each method of the site, by its number.
        tower: What entered the projector, [T, P, D].
        projected: What the projector makes of it, [T, p, D'], if a method asks for that.
        frames: The tiles or frames, in order.
        side: Patches along a side that the projector merges into one feature.
        cells: (down, across) of the pooled grid of each frame; None if nothing is pooled.
        there: bool [T, P], like ``tower``: states whose patches did not leave the tower; None: all.
        full: bool per cell of each frame, whether it holds any such state; None: all do.
        tiles: Tiles of each picture, where the model packs features by a function of its own.
        pack: That function on marks [T, p, C], one tensor [n, C] for each picture.
    """

    modality: str
    grids: list[tuple[int, int, int]] = field(default_factory=list)
    states: dict[int, Any] = field(default_factory=dict)
    tower: Tensor | None = None
    projected: Tensor | None = None
    frames: list[Frame] = field(default_factory=list)
    side: int = 1
    cells: list[tuple[int, int]] | None = None
    there: Tensor | None = None
    full: list[Tensor] | None = None
    tiles: list[int] = field(default_factory=list)
    pack: Callable[[Tensor], list[Tensor]] | None = None
