"""The examples of a supervised fine-tuning: measured, chosen, packed, and read when asked for.

Lengths are known before any pixel is: a picture's size stands in the head of its file, and how many
tokens a processor writes for a size does not depend on what the picture shows. So a row that is too
long is found at the start, not hours later, and rows can be packed and sorted by length.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import ImageReadError, InputError
from training.errors import ConversationTooLong
from training.pictures import picture_size, read_pictures
from training.sft.encoding import Encoder
from training.sft.packing import pack
from training.sft.rows import Conversation

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["BadRow", "Example", "Examples", "Measured", "measure"]

BadRow = Literal["error", "drop"]
"""What happens to a row that cannot be used as it is: the training is refused, or goes without."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Measured:
    """The rows that can be used.

    Attributes:
        kept: Their numbers, ascending.
        lengths: Tokens of each of them, pictures included.
        dropped: How many rows were left out, by reason.
    """

    kept: tuple[int, ...]
    lengths: tuple[int, ...]
    dropped: dict[str, int]


@dataclass(frozen=True)
class Example:
    """What one row of a batch is made of: a conversation, or several packed ones.

    Attributes:
        rows: The conversations.
        pictures: The pictures of each.
    """

    rows: tuple[Conversation, ...]
    pictures: tuple[tuple[Image.Image, ...], ...]


def measure(
    rows: Sequence[Conversation],
    encoder: Encoder,
    *,
    max_length: int | None = None,
    overlong: BadRow = "error",
    on_bad_image: BadRow = "error",
    progress: Callable[[Iterable[Conversation]], Iterable[Conversation]] = iter,
) -> Measured:
    """Counts the tokens of every row and leaves out, or refuses, what cannot be used.

    Nothing is cut: a cut picture could not be read by any model, and a cut answer would teach to
    stop in mid-sentence.

    Args:
        rows: Conversations.
        encoder: Knows the lengths.
        max_length: Most tokens of a row, pictures included; None for no limit.
        overlong: What to do with longer ones.
        on_bad_image: What to do with rows whose picture has no readable head.
        progress: Wraps the rows, to show a bar.

    Raises:
        ConversationTooLong: Under ``overlong="error"``, with the counts.
        ImageReadError: Under ``on_bad_image="error"``.
        InputError: If no row is left, or a row cannot be rendered.
    """
    kept, lengths = [], []
    dropped: Counter[str] = Counter()
    for number, row in enumerate(progress(rows)):
        try:
            sizes = tuple(picture_size(path) for path in row.images)
        except ImageReadError as error:
            if on_bad_image == "error":
                raise ImageReadError(f"{row.place}: {error}", advice=error.advice) from error
            dropped["unreadable picture"] += 1
            continue
        length = encoder.count(row, sizes)
        if max_length is not None and length > max_length:
            if overlong == "error":
                raise _too_long(row, encoder, sizes, length, max_length)
            dropped["too long"] += 1
            continue
        kept.append(number)
        lengths.append(length)
    if not kept:
        raise InputError(
            f"None of the {len(rows)} rows can be used: "
            f"{', '.join(f'{n} {reason}' for reason, n in dropped.items())}.",
            advice="Check max_length and the pictures' paths.",
        )
    return Measured(tuple(kept), tuple(lengths), dict(dropped))


def _too_long(
    row: Conversation,
    encoder: Encoder,
    sizes: tuple[tuple[int, int], ...],
    length: int,
    max_length: int,
) -> ConversationTooLong:
    return ConversationTooLong(
        f"{row.place}: row {row.id!r} has {length} tokens, {encoder.image_tokens(sizes)} of them "
        f"of its {len(sizes)} pictures; max_length is {max_length}.",
        advice="Raise max_length (rows are never cut), or set overlong: drop.",
    )


class Examples:
    """A data set for a Trainer: one example per number, its pictures read when it is asked for.

    Args:
        rows: All conversations.
        measured: Those that are used, None for all of them (their lengths are unknown then).
        capacity: Packs conversations into rows of so many tokens; None for one each. Needs
            ``measured``.
        seed: Of packing.
        on_bad_image: Under "drop" the place of an example that cannot be read is taken by the next
            one, so that a batch never gets empty.

    Attributes:
        lengths: Tokens of every example, None if they were not measured.
    """

    def __init__(
        self,
        rows: Sequence[Conversation],
        measured: Measured | None = None,
        *,
        capacity: int | None = None,
        seed: int = 0,
        on_bad_image: BadRow = "error",
    ) -> None:
        self._rows = rows
        self._on_bad_image = on_bad_image
        self.lengths: list[int] | None = None
        self._groups = [(number,) for number in range(len(rows))]
        if measured is not None:
            groups = [(n,) for n in range(len(measured.kept))]
            if capacity is not None:
                groups = pack(measured.lengths, capacity, seed)
            self._groups = [tuple(measured.kept[n] for n in group) for group in groups]
            self.lengths = [sum(measured.lengths[n] for n in group) for group in groups]

    def __len__(self) -> int:
        return len(self._groups)

    def __getitem__(self, number: int) -> Example:
        for step in range(len(self)):
            example = self._read(self._groups[(number + step) % len(self)])
            if example.rows:
                return example
        raise InputError(
            f"Not one picture of {len(self)} examples can be read.",
            advice="Check image_folder and the paths in the rows.",
        )

    def _read(self, group: Sequence[int]) -> Example:
        rows: list[Conversation] = []
        pictures: list[tuple[Any, ...]] = []
        for number in group:
            row = self._rows[number]
            try:
                own = tuple(read_pictures(row.images, row.place))
            except ImageReadError as error:
                if self._on_bad_image == "error":
                    raise
                _log.warning("Row left out: %s", error)
                continue
            rows.append(row)
            pictures.append(own)
        return Example(tuple(rows), tuple(pictures))
