"""From a composed record to what the model is given: pictures, messages, number of tokens.

Both stages that run the model, answering and scoring, make their prompts here, so that a response
is scored behind the very prompt that it answered.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from data_tools.mia.records import SEQUENCE, locate
from mmlm.errors import InputError
from mmlm.inputs import Message, load_image, message, prepare

if TYPE_CHECKING:
    from torch import Tensor

    from mmlm.engine.anatomy import Anatomy

__all__ = ["Prompted", "check_several_images", "context_length", "noised", "prompted"]


@dataclass(frozen=True)
class Prompted:
    """A record as a prompt.

    Attributes:
        record: The record.
        pictures: What the model sees, noise on the target included.
        text: The prompt with the marks ``<image 1>``, ``<image 2>`` ... where the pictures stand.
    """

    record: Mapping[str, Any]
    pictures: tuple[Image.Image, ...]
    text: str

    @property
    def conversation(self) -> list[Message]:
        """The user's turn in chat format."""
        return [message("user", self.text, len(self.pictures), marked=True)]


def prompted(record: Mapping[str, Any], root: Path, noise: float | None) -> Prompted:
    """Reads a record's pictures and writes its prompt.

    Args:
        record: An instruction (`data_tools.mia.records`).
        root: Folder that its paths are relative to.
        noise: Standard deviation, in grey levels, of noise on the target; None: clean.

    Raises:
        ImageReadError: If a picture cannot be read.
    """
    pictures = [load_image(locate(root, path)) for path in record["images"]]
    if noise is not None:
        sequence = record["format"] == SEQUENCE
        place = record["target_index"] - 1 if sequence else 0
        box = (0, 0, *pictures[place].size) if sequence else _target_tile(record)
        seed = f"{record['seed']}\0{record['id']}"
        pictures[place] = noised(pictures[place], box, noise, seed)
    return Prompted(record, tuple(pictures), _marked(record["prompt_segments"]))


def _target_tile(record: Mapping[str, Any]) -> tuple[int, int, int, int]:
    x0, y0, x1, y1 = record["tiles"][record["target_index"] - 1]
    return x0, y0, x1, y1


def _marked(segments: Sequence[Mapping[str, str]]) -> str:
    parts, shown = [], 0
    for segment in segments:
        shown += segment["type"] == "image"
        parts.append(f"<image {shown}>" if segment["type"] == "image" else segment["text"])
    return "".join(parts)


def noised(
    picture: Image.Image, box: tuple[int, int, int, int], std: float, seed: str
) -> Image.Image:
    """A picture with Gaussian noise in a rectangle, added in floating point and clipped.

    The authors (Liuziyu77/MIA-DPO, commit a85c51a) add noise of 225 to the target's tile of a
    collage, and one of 49 to an inner picture in 8-bit arithmetic, where it wraps round.

    Args:
        picture: RGB.
        box: Where, in pixels; right and lower border excluded.
        std: Standard deviation in grey levels.
        seed: Any text; equal texts give equal noise.
    """
    digest = hashlib.sha256(seed.encode()).digest()
    generator = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    pixels = np.asarray(picture.crop(box), dtype=np.float64)
    noisy = np.clip(np.round(pixels + generator.normal(0.0, std, pixels.shape)), 0, 255)
    changed = picture.copy()
    changed.paste(Image.fromarray(noisy.astype(np.uint8)), box[:2])
    return changed


def context_length(model: Any) -> int | None:
    """Longest sequence that the text decoder was made for; None if it does not say."""
    length = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return None if length is None else int(length)


def check_several_images(model: Any, processor: Any) -> None:
    """Makes sure that a prompt with two pictures reaches the model as two pictures.

    Raises:
        InputError: If the chat template drops one, the processor refuses two, or both get no
            tokens of their own.
    """
    from mmlm.engine.anatomy import Anatomy

    anatomy = Anatomy(model)
    picture = Image.new("RGB", (64, 64), "grey")
    try:
        one, two = (
            _image_tokens(
                anatomy,
                prepare(processor, [[message("user", marks, n, marked=True)]], [[picture] * n]),
            )
            for n, marks in ((1, "<image 1>a"), (2, "<image 1>a<image 2>b"))
        )
    except (ValueError, IndexError, InputError) as error:
        raise _single(f"its processor or chat template refuses two: {error}") from error
    if len(two) != 2 or (anatomy.family.sizes != "packed" and sum(two) != 2 * sum(one)):
        raise _single(
            f"a prompt with two has {sum(two)} image tokens of {len(two)} image(s), and one with "
            f"one has {sum(one)}"
        )


def _image_tokens(anatomy: Anatomy, inputs: dict[str, Tensor]) -> list[int]:
    """Tokens of each image of one prompt.

    Raises:
        LayoutError: If pictures and placeholders do not match.
    """
    from mmlm.engine.layout import TokenLayout
    from mmlm.engine.vision.sizes import tell_images_apart

    layout = TokenLayout.from_ids(
        inputs["input_ids"],
        inputs["attention_mask"],
        image_ids=anatomy.image_ids,
        wrapper_ids=anatomy.wrapper_ids,
        framing=anatomy.family.framing,
    )
    image = tell_images_apart(anatomy, layout, inputs).img
    counts: list[int] = image[image >= 0].long().bincount().tolist()
    return counts


def _single(reason: str) -> InputError:
    return InputError(
        f"This model cannot be shown several pictures: {reason}.",
        advice="Choose a model with several-image support, or another --model.chat_template.",
    )
