"""Which questions are answered together: those of like length, so that little is padding.

Left padding costs as much as tokens do. A benchmark with short and long questions therefore runs
faster if its batches are cut from sorted questions; the answers are stored in the order of the
data set all the same (`mmlm.records.RecordFile.in_order`).
"""

from __future__ import annotations

import functools
import io
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmlm.runner import Request

__all__ = ["WINDOW", "batches"]

WINDOW = 32
"""Questions are sorted within this many batches: a reader of the output never waits for long."""
_UNKNOWN = 1 << 40
"""Length of a prompt that cannot be made: it is tried first, so that its error shows at once."""


def batches(processor: Any, requests: Sequence[Request], batch_size: int) -> list[list[Request]]:
    """Cuts requests into batches; the longest of a window comes first.

    The longest first, because that is where memory would run out: better at once than after an
    hour. Depends on the requests and the processor only, never on what was answered already.

    Args:
        processor: A Hugging Face processor; tells how many tokens a picture becomes.
        requests: All requests of a run.
        batch_size: Requests per batch.

    Returns:
        The batches; requests of equal length keep their order.
    """
    if batch_size == 1:
        return [[request] for request in requests]
    count = _Lengths(processor)
    cut = []
    for start in range(0, len(requests), WINDOW * batch_size):
        window = sorted(
            requests[start : start + WINDOW * batch_size], key=count.tokens_of, reverse=True
        )
        cut += [window[at : at + batch_size] for at in range(0, len(window), batch_size)]
    return cut


class _Lengths:
    """How long prompts are, as well as it can be told without making them."""

    def __init__(self, processor: Any) -> None:
        self._tokenizer = processor.tokenizer
        self._count = getattr(processor, "_get_num_multimodal_tokens", None)
        self._of_size = functools.cache(self._picture_tokens)
        self._text_tokens = functools.cache(self._tokenize)

    def tokens_of(self, request: Request) -> int:
        total = sum(map(self._text_tokens, (request.prompt, *request.follow_ups)))
        for source in request.images:
            size = _size(source)
            total += self._of_size(*size) if size else _UNKNOWN
        return total

    def _tokenize(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False)["input_ids"])

    def _picture_tokens(self, width: int, height: int) -> int:
        # A family whose processor cannot tell gives every picture the same number of tokens, or
        # is sorted by the words alone: slower, never wrong.
        if self._count is None:
            return 0
        try:
            return int(self._count(image_sizes=[(height, width)])["num_image_tokens"][0])
        except ValueError:  # a shape that the processor refuses
            return _UNKNOWN


def _size(source: Any) -> tuple[int, int] | None:
    """Width and height of a picture from its header; None if it cannot be read."""
    if hasattr(source, "size"):
        return source.size
    return _header(source if isinstance(source, bytes) else str(source))


@functools.lru_cache(maxsize=65536)
def _header(source: str | bytes) -> tuple[int, int] | None:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(io.BytesIO(source) if isinstance(source, bytes) else source) as picture:
            return picture.size
    except (OSError, ValueError, UnidentifiedImageError, Image.DecompressionBombError):
        return None
