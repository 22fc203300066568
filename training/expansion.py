"""What a processor writes for pictures into a text, told from their sizes, before any pixel."""

from __future__ import annotations

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

    Attributes:
        image_ids: Ids of the tokens that the processor counts as its pictures'.
    """

    def __init__(self, processor: Any) -> None:
        self._processor = processor
        ids = getattr(processor, "image_token_ids", None) or [processor.image_token_id]
        self.image_ids = frozenset(one for one in ids if one is not None)
        self._known: dict[Sizes, tuple[str, ...]] = {}
        self._counts: dict[Sizes, int] = {}

    def expanded(self, text: str, sizes: Sizes) -> str:
        """A text with its placeholders expanded.

        Raises:
            ValueError: If it has more or fewer placeholders than there are sizes.
        """
        if not sizes:
            return text
        around = text.split(self._processor.image_token)
        places = zip(self._of(sizes), around[1:], strict=True)
        return around[0] + "".join(one + behind for one, behind in places)

    def n_tokens(self, sizes: Sizes) -> int:
        """Image tokens of pictures of these sizes in one row, the processor's frames included."""
        if not sizes:
            return 0
        if sizes not in self._counts:
            text = "".join(self._of(sizes))
            ids = self._processor.tokenizer(text, add_special_tokens=False)["input_ids"]
            self._counts[sizes] = sum(token in self.image_ids for token in ids)
        return self._counts[sizes]

    def _of(self, sizes: Sizes) -> tuple[str, ...]:
        from PIL import Image

        if sizes not in self._known:
            batch = self._processor(
                text=[self._processor.image_token * len(sizes)],
                images=[[Image.new("RGB", size) for size in sizes]],
                return_text_replacement_offsets=True,
            )
            [places] = batch["text_replacement_offsets"]
            self._known[sizes] = tuple(one["replacement"] for one in places)
        return self._known[sizes]
