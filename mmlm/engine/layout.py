"""TokenLayout: which position is image, prompt, answer or padding, and of which image.

Built once per prompt from the token ids; every method and the engine read this one object, and no
method ever compares ids with an image id.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from mmlm.errors import LayoutError

__all__ = ["ANSWER", "PAD", "PROMPT", "VISUAL", "Framing", "TokenLayout"]

PAD, VISUAL, PROMPT, ANSWER = 0, 1, 2, 3

#: How tokens that only frame an image are told. ``"ids"``: by their ids alone. ``"neighbours"``:
#: the token before and the token after each run of visual ones. ``"tiles"``: each tile of an image
#: is written as ``mark name visual...`` and the image's last tile is followed by one more mark;
#: line breaks may stand between a tile and the next mark. The mark is whatever token stands two
#: before the row's first visual one.
Framing: TypeAlias = Literal["ids", "neighbours", "tiles"]


@dataclass(frozen=True, eq=False)
class TokenLayout:
    """Roles of the positions of a batch of prompts, [B, N] each.

    Attributes:
        seg: int8; 0 padding, 1 visual, 2 prompt, 3 answer.
        img: int16; index of the image within its row, -1 outside. Without further knowledge an
            image is a maximal block of adjacent visual positions; then two images side by side
            without any token between them count as one (see :meth:`with_images`).
        frame: bool; tokens that only frame an image (vision start / end, names of tiles).
        doc: int16; document within a packed row, -1 on padding. A plain prompt is document 0.
        turn: int16; turn within a conversation. A plain prompt is turn 0; collators and chat
            templates know more (:mod:`mmlm.engine.masks.turns`).
        behind: bool; tokens of an assistant's header behind its first one, the marker. All False
            where nobody asked for them.
    """

    seg: Tensor
    img: Tensor
    frame: Tensor
    doc: Tensor
    turn: Tensor
    behind: Tensor = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.behind is None:
            object.__setattr__(self, "behind", torch.zeros_like(self.frame))

    @classmethod
    def from_ids(
        cls,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        *,
        image_ids: tuple[int, ...],
        wrapper_ids: tuple[int, ...] = (),
        framing: Framing = "ids",
        right: bool = False,
    ) -> TokenLayout:
        """Reads the roles from token ids.

        Args:
            input_ids: [B, N].
            attention_mask: [B, N], 1 on real tokens; None means no padding.
            image_ids: Ids of visual placeholder tokens.
            wrapper_ids: Ids of tokens that frame an image.
            framing: How frames are told besides by ``wrapper_ids``, see :data:`Framing`.
            right: Whether padding may stand on the right, as it does in training.

        Raises:
            LayoutError: If the shapes disagree or the padding is not where it may be.
        """
        real = _real_positions(input_ids, attention_mask, right)
        visual = torch.isin(input_ids, input_ids.new_tensor(image_ids)) & real
        starts = visual & ~_shifted(visual, 1)
        frame = torch.isin(input_ids, input_ids.new_tensor(wrapper_ids)) & real
        if framing == "neighbours":
            frame = frame | _shifted(visual, 1) | _shifted(visual, -1)
        elif framing == "tiles":
            frame, starts = _tiles(input_ids, visual, starts)
        frame = frame & real & ~visual
        seg = torch.where(visual, VISUAL, torch.where(real, PROMPT, PAD)).to(torch.int8)
        index = starts.long().cumsum(-1) - 1
        img = torch.where(visual, index, -1).to(torch.int16)
        doc = torch.where(real, 0, -1).to(torch.int16)
        return cls(seg=seg, img=img, frame=frame, doc=doc, turn=torch.zeros_like(doc))

    @classmethod
    def below(cls, layouts: list[TokenLayout]) -> TokenLayout:
        """Several layouts of one length as one, row below row."""
        names = cls.__dataclass_fields__
        return cls(**{n: torch.cat([getattr(x, n) for x in layouts]) for n in names})

    @property
    def rows(self) -> int:
        """Number of rows B."""
        return self.seg.shape[0]

    @property
    def length(self) -> int:
        """Number of positions N."""
        return self.seg.shape[1]

    @property
    def real(self) -> Tensor:
        """Bool [B, N]: everything but padding."""
        return self.seg != PAD

    @property
    def visual(self) -> Tensor:
        """Bool [B, N]: visual positions."""
        return self.seg == VISUAL

    def has_image(self) -> Tensor:
        """Bool [B]: rows that hold at least one visual position."""
        return self.visual.any(-1)

    def check(self, rows: int, length: int) -> None:
        """Refuses a layout that cannot be the one of a batch.

        Args:
            rows: Rows of the batch; they may be a multiple of the layout's (beams).
            length: Positions of the batch.

        Raises:
            LayoutError: If shapes differ, or ``seg`` holds anything but 0 to 3.
        """
        shapes = {n: tuple(getattr(self, n).shape) for n in self.__dataclass_fields__}
        if set(shapes.values()) != {(self.rows, length)} or rows % max(self.rows, 1):
            given = ", ".join(f"{n} {shape}" for n, shape in shapes.items())
            raise LayoutError(
                f"The layout's tensors ({given}) do not fit inputs of shape {(rows, length)}.",
                advice="Every tensor of a TokenLayout has the shape of input_ids.",
            )
        wrong = (self.seg < PAD) | (self.seg > ANSWER)
        if bool(wrong.any()):
            row, place = wrong.nonzero()[0].tolist()
            raise LayoutError(
                f"The layout's seg holds {int(self.seg[row, place])} in row {row} at position "
                f"{place}; 0 (padding), 1 (visual), 2 (prompt) and 3 (answer) are allowed.",
                advice="TokenLayout.from_ids reads the roles from token ids.",
            )

    def last_row(self) -> Tensor:
        """int64 [B]: the last real position of each row: N - 1 where padding is on the left."""
        index = torch.arange(self.length, device=self.seg.device)
        return torch.where(self.real, index, -1).amax(-1)

    def last_image_end(self) -> Tensor:
        """int64 [B]: the last visual position of each row, -1 without an image."""
        index = torch.arange(self.length, device=self.seg.device)
        return torch.where(self.visual, index, -1).amax(-1)

    def with_images(self, sizes: Tensor) -> TokenLayout:
        """The layout with images told apart by their sizes, also where they stand side by side.

        Args:
            sizes: int64 [images]; how many visual positions each image takes, row after row.

        Raises:
            LayoutError: If the sizes do not add up to the visual positions.
        """
        visual = self.visual
        ends = sizes.to(visual.device).cumsum(0)
        count, expected = int(visual.sum()), int(sizes.sum())
        if count != expected:
            raise LayoutError(
                f"The images take {expected} positions, but the prompts hold {count} placeholders.",
                advice="Pass the processor's input_ids and pixel inputs together.",
            )
        order = visual.flatten().long().cumsum(0).view(visual.shape) - 1
        image = torch.bucketize(order, ends, right=True)
        first = torch.where(visual, image, len(ends)).amin(-1, keepdim=True)
        return replace(self, img=torch.where(visual, image - first, -1).to(torch.int16))

    def append(self, n: int) -> TokenLayout:
        """The layout with ``n`` more answer positions at the end."""

        def grown(x: Tensor, value: int | Tensor) -> Tensor:
            tail = x.new_empty(self.rows, n)
            tail[:] = value if isinstance(value, int) else value[:, None]
            return torch.cat([x, tail], dim=-1)

        return TokenLayout(
            seg=grown(self.seg, ANSWER),
            img=grown(self.img, -1),
            frame=grown(self.frame, 0),
            doc=grown(self.doc, self.doc[:, -1]),
            turn=grown(self.turn, self.turn[:, -1]),
            behind=grown(self.behind, 0),
        )

    def expand(self, k: int) -> TokenLayout:
        """Each row ``k`` times in a row, as beam search and several return sequences do."""
        return self._map(lambda x: x.repeat_interleave(k, dim=0))

    def gather_rows(self, rows: slice) -> TokenLayout:
        """The layout of some rows."""
        return self._map(lambda x: x[rows])

    def gather(self, keep: Tensor) -> TokenLayout:
        """The layout of the positions ``keep`` (int64 [B, n]), in that order; -1 is padding."""
        index, empty = keep.clamp(min=0), keep < 0
        picked = self._map(lambda x: x.gather(1, index))
        return replace(
            picked,
            seg=picked.seg.masked_fill(empty, PAD),
            img=picked.img.masked_fill(empty, -1),
            frame=picked.frame & ~empty,
            doc=picked.doc.masked_fill(empty, -1),
            behind=picked.behind & ~empty,
        )

    def with_text(self, where: Tensor) -> TokenLayout:
        """The layout with prompt text where bool [B, N] says so, in the last document's turn."""
        return replace(
            self,
            seg=self.seg.masked_fill(where, PROMPT),
            doc=torch.where(where, self.doc[:, -1:], self.doc),
            turn=torch.where(where, self.turn[:, -1:], self.turn),
            behind=self.behind & ~where,
        )

    def join(self, turn: TokenLayout) -> TokenLayout:
        """The layout with the positions of one more turn of the conversation behind it."""
        last = self.img.amax(-1, keepdim=True)
        after = replace(
            turn,
            img=torch.where(turn.img >= 0, turn.img + last + 1, -1).to(self.img.dtype),
            doc=torch.where(turn.real, self.doc[:, -1:], -1).to(self.doc.dtype),
            turn=turn.turn + self.turn[:, -1:] + 1,
        )
        names = self.__dataclass_fields__
        return TokenLayout(
            **{n: torch.cat([getattr(self, n), getattr(after, n)], dim=1) for n in names}
        )

    def _map(self, f) -> TokenLayout:  # type: ignore[no-untyped-def]  # noqa: ANN001
        return replace(self, **{n: f(getattr(self, n)) for n in self.__dataclass_fields__})


def _real_positions(input_ids: Tensor, attention_mask: Tensor | None, right: bool) -> Tensor:
    if input_ids.ndim != 2:
        raise LayoutError(
            f"input_ids must be [B, N], got shape {tuple(input_ids.shape)}.",
            advice="Pass a batch of token ids.",
        )
    if attention_mask is None:
        return torch.ones_like(input_ids, dtype=torch.bool)
    if attention_mask.shape != input_ids.shape:
        raise LayoutError(
            f"attention_mask has shape {tuple(attention_mask.shape)}, input_ids "
            f"{tuple(input_ids.shape)}; a prompt needs a 2-D mask of the same shape.",
            advice="Pass the processor's attention_mask unchanged, or supply `layout=`.",
        )
    real = attention_mask.bool()
    begins, ends = ~real[:, :-1] & real[:, 1:], real[:, :-1] & ~real[:, 1:]
    whole = not bool((begins.cumsum(1) + real[:, :1] > 1).any())
    if bool(ends.any()) and not (right and whole):
        raise LayoutError(
            "The prompts are padded on the right or have holes in their attention mask.",
            advice="Set processor.tokenizer.padding_side = 'left'.",
        )
    return real


def _shifted(x: Tensor, by: int) -> Tensor:
    """``x`` moved by one position to the right (1) or left (-1), False moving in."""
    out = torch.zeros_like(x)
    if by > 0:
        out[:, 1:] = x[:, :-1]
    else:
        out[:, :-1] = x[:, 1:]
    return out


def _tiles(ids: Tensor, visual: Tensor, starts: Tensor) -> tuple[Tensor, Tensor]:
    """Frames, and where images begin, of images written as framed tiles (all bool [B, N])."""
    index = torch.arange(ids.shape[1], device=ids.device)
    first = torch.where(visual, index, ids.shape[1]).amin(-1)
    mark = ids.gather(1, (first - 2).clamp(min=0, max=ids.shape[1] - 1)[:, None])
    marks = (ids == mark) & visual.any(-1, keepdim=True)
    seen = marks.long().cumsum(-1)
    # Between a tile and the next mark there is nothing but line breaks.
    last_visual = torch.where(visual, index, -1).cummax(-1).values
    last_mark = torch.where(marks, index, -1).cummax(-1).values
    between = (last_visual > last_mark) & (seen < seen[:, -1:])
    frame = marks | _shifted(starts, -1) | between
    # One mark between two tiles: the same image goes on. Two: the first closed an image.
    at_start = torch.where(starts, seen, 0).cummax(-1).values
    before = functional.pad(at_start[:, :-1], (1, 0))
    return frame, starts & ((before == 0) | (seen - before > 1))
