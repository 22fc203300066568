"""Batches of conversations as a model's forward pass takes them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from training.sft.documents import IGNORED, padded
from training.sft.encoding import Encoder
from training.sft.packing import packed_batch
from training.sft.rows import Conversation

if TYPE_CHECKING:
    from PIL import Image

    from training.sft.data import Example

__all__ = ["SFTCollator"]


class SFTCollator:
    """Examples to batches: ids, exact labels, mask or positions, and the pictures' tensors.

    * One conversation per row: ``input_ids``, ``labels``, ``attention_mask`` [B, L], padded on the
      right, so that models count positions themselves.
    * Packed: no mask, but ``position_ids`` that start again at each conversation
      (`training.sft.packing`).

    Nothing is ever cut off: what is too long was refused or left out before
    (`training.sft.data`).

    Args:
        encoder: Processor and labels.
        packed: Whether examples may hold several conversations, and batches have no mask.
        rope: 3-D positions of packed rows, see `training.sft.packing.rope_index`.
        pad_to_multiple_of: Lengths are multiples of it.
        dummy_picture: Adds a blank picture to a batch without any, in a conversation of its own
            from which nothing is learned. The loss stays the same, and the tower and the projector
            take part in every pass of every process: with sharded weights (ZeRO-3) a process that
            never asks for them would leave the others waiting for ever, and DDP would miss their
            gradients.
    """

    def __init__(
        self,
        encoder: Encoder,
        *,
        packed: bool = False,
        rope: Callable[..., Any] | None = None,
        pad_to_multiple_of: int | None = None,
        dummy_picture: bool = False,
    ) -> None:
        self._encoder = encoder
        self._packed, self._rope = packed, rope
        self._multiple = pad_to_multiple_of or 1
        self._dummy = dummy_picture

    def __call__(self, examples: Sequence[Example]) -> dict[str, Any]:
        """A batch of examples.

        Raises:
            InputError: As `training.sft.encoding.Encoder`.
        """
        layout = [len(example.rows) for example in examples]
        rows = [row for example in examples for row in example.rows]
        pictures = [own for example in examples for own in example.pictures]
        dummy = self._dummy and not any(pictures)
        if dummy:
            rows, pictures = [*rows, _DUMMY], [*pictures, [_blank()]]
        documents, pixels = self._encoder(rows, pictures)
        if dummy:
            documents[-1].labels.fill_(IGNORED)
            layout.append(1)
        pad_token_id = self._encoder.pad_token_id
        if not self._packed:
            return {
                **padded(documents, pad_token_id=pad_token_id, multiple=self._multiple),
                **pixels,
                # Nobody reads it, and without one built-in methods know a pass of a training.
                "use_cache": False,
            }
        if dummy and len(layout) > 1:
            # Behind the last row: flash kernels take a single one.
            layout[-2:] = [layout[-2] + 1]
        ends = [sum(layout[: n + 1]) for n in range(len(layout))]
        return packed_batch(
            [documents[end - n : end] for end, n in zip(ends, layout, strict=True)],
            pixels,
            pad_token_id=pad_token_id,
            multiple=self._multiple,
            rope=self._rope,
        )


_DUMMY = Conversation(
    id="dummy",
    images=("blank",),
    messages=(
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "."}]},
        {"role": "assistant", "content": [{"type": "text", "text": "."}]},
    ),
    place="dummy",
)


def _blank() -> Image.Image:
    from PIL import Image

    return Image.new("RGB", (56, 56), "grey")
