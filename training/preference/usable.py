"""Which rows a training can use, told before its first step.

Every picture is decoded once and every row is measured, so a damaged file or a row that is too long
is found at the start and not hours later, and the sampler never sees a row that a batch would have
to go without: no batch gets smaller, and none gets empty.
"""

from __future__ import annotations

import logging
import warnings
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, NamedTuple

from mmlm.errors import ImageReadError
from mmlm.progress import progress_bar
from training.errors import EqualResponses, PreferenceTooLong
from training.pictures import picture_size
from training.preference.rows import PreferenceRow

if TYPE_CHECKING:
    from training.preference.collator import VisionPreferenceCollator

__all__ = ["UsableRows", "usable_rows"]

THREADS = 4
"""Decoders let go of the interpreter."""

_log = logging.getLogger(__name__)


class UsableRows(NamedTuple):
    """The rows that a training can use.

    Attributes:
        kept: The rows, in their order.
        lengths: Tokens of the longer side of each, pictures included: what rows are grouped by.
        left_out: How many rows were left out, by reason.
    """

    kept: list[PreferenceRow]
    lengths: list[int]
    left_out: dict[str, int]


def usable_rows(
    rows: Sequence[PreferenceRow],
    collator: VisionPreferenceCollator,
    *,
    decode: bool = True,
    show: bool = False,
) -> UsableRows:
    """Measures all rows; leaves out, or refuses, what cannot be used.

    What becomes of a row that is too long or has an unreadable picture, the collator says
    (`overlong`, `on_bad_image`). Rows whose answers are equal are always left out. Everything else
    that is wrong with a row is an error.

    Args:
        rows: The rows.
        collator: Of the training.
        decode: Decode the pictures completely. False reads the heads of their files only: faster,
            and a file that is cut off stays unnoticed until a batch needs it.
        show: Whether to draw a progress bar.

    Warns:
        UserWarning: No row has a picture.

    Raises:
        PreferenceTooLong: Under ``overlong="error"``.
        ImageReadError: Under ``on_bad_image="error"``.
        InputError: See `training.preference.encoding.PairEncoder`.
    """
    if rows and not any(row.images for row in rows):
        warnings.warn(
            f"None of {len(rows)} rows has a picture: a vision-language model is trained on text "
            "alone.",
            stacklevel=2,
        )
    usable = UsableRows([], [], {})
    left_out: Counter[str] = Counter()
    with (
        progress_bar(len(rows), show, "pairs measured") as advance,
        ThreadPoolExecutor(THREADS) as pool,
    ):
        sizes = _Sizes(pool, rows, decode)
        try:
            for row in rows:
                reason = _take(row, sizes, collator, usable)
                if reason:
                    left_out[reason] += 1
                advance(1, f"{left_out.total()} left out" if left_out else "")
        finally:
            pool.shutdown(cancel_futures=True)
    usable.left_out.update(left_out)
    return usable


def _take(
    row: PreferenceRow, sizes: _Sizes, collator: VisionPreferenceCollator, usable: UsableRows
) -> str:
    """Adds a row to the usable ones, or says why not."""
    try:
        length = collator.length(row, sizes.of(row))
    except EqualResponses as error:
        return _said(row, "equal answers", error)
    except ImageReadError as error:
        if collator.on_bad_image == "error":
            raise
        return _said(row, "unreadable picture", error)
    except PreferenceTooLong as error:
        if collator.overlong == "error":
            raise
        return _said(row, "too long", error)
    usable.kept.append(row)
    usable.lengths.append(length.tokens)
    return ""


def _said(row: PreferenceRow, reason: str, error: Exception) -> str:
    _log.warning("Row %r left out: %s", row.id, error)
    return reason


class _Sizes:
    """Sizes of the pictures of many rows, found ahead in other threads, each picture once."""

    def __init__(
        self, pool: ThreadPoolExecutor, rows: Sequence[PreferenceRow], decode: bool
    ) -> None:
        self._decode = decode
        paths = dict.fromkeys(
            image for row in rows for image in row.images if isinstance(image, str)
        )
        self._found = {path: pool.submit(picture_size, path, decode=decode) for path in paths}

    def of(self, row: PreferenceRow) -> tuple[tuple[int, int], ...]:
        try:
            return tuple(self._size(image) for image in row.images)
        except ImageReadError as error:
            raise ImageReadError(f"row {row.id!r}: {error}", advice=error.advice) from error

    def _size(self, image: Any) -> tuple[int, int]:
        if isinstance(image, str):
            return self._found[image].result()
        return picture_size(image, decode=self._decode)
