"""Makes sure, before any work, that a model shows the attention that scoring needs."""

from __future__ import annotations

from typing import Any

from PIL import Image

from data_tools.mia.forced import force
from mmlm.inputs import message, prepare

__all__ = ["check_attention"]


def check_attention(model: Any, processor: Any, layer: int | None) -> None:
    """Scores a two-token response about two grey pictures.

    Args:
        model: A Hugging Face vision-language model that takes several pictures.
        processor: Its processor.
        layer: Decoder layer; None: the default one.

    Raises:
        NotImplementedError: If the attention of the layer cannot be seen; names the layer.
    """
    picture = Image.new("RGB", (64, 64), "grey")
    question = message("user", "<image 1><image 2>a", 2, marked=True)
    inputs = prepare(
        processor, [[question]], [[picture, picture]], device=model.device, dtype=model.dtype
    )
    text = int(inputs["input_ids"][0, -1])  # some token that is no image
    force(model, processor, inputs, [[text, text]], layer=layer, probabilities=False)
