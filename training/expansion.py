"""What a processor writes for pictures into a text, told from their sizes, before any pixel."""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

__all__ = ["PictureText", "Sizes"]

Sizes: TypeAlias = tuple[tuple[int, int], ...]
"""Width and height of the pictures of one row."""


class PictureText:
    """Expands the placeholders of one row's text as the processor will do it.

    The processor is asked with blank pictures, once for the same sizes. It is asked about all
    pictures of a row together: some cut a picture into tiles only where it is alone.

    Args:
        processor: A Hugging Face processor (transformers 5.23: it says what it put where).
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        ids = getattr(processor, "image_token_ids", None) or [processor.image_token_id]
        self.image_ids = frozenset(one for one in ids if one is not None)
        self._of_sizes = lru_cache(maxsize=65536)(self._ask)
        self._counts = lru_cache(maxsize=65536)(self._count)

    def expanded(self, text: str, sizes: Sizes) -> str:
        """A text with its placeholders expanded.

        Raises:
            ValueError: If it has more or fewer placeholders than there are sizes.
        """
        if not sizes:
            return text
        around = text.split(self._processor.image_token)
        places = zip(self._of_sizes(sizes), around[1:], strict=True)
        return around[0] + "".join(one + behind for one, behind in places)

    def n_tokens(self, sizes: Sizes) -> int:
        """Image tokens of pictures of these sizes in one row, the processor's frames included."""
        return self._counts(sizes)

    def _count(self, sizes: Sizes) -> int:
        if not sizes:
            return 0
        text = "".join(self._of_sizes(sizes))
        ids = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
        return sum(token in self.image_ids for token in ids)

    def _ask(self, sizes: Sizes) -> tuple[str, ...]:
        from PIL import Image

        batch = self._processor(
            text=[self._processor.image_token * len(sizes)],
            images=[[Image.new("RGB", size) for size in sizes]],
            return_text_replacement_offsets=True,
        )
        return tuple(one["replacement"] for one in batch["text_replacement_offsets"][0])
