"""How bright each image token of a drawing is: the way from pixels to tokens, family by family.

Processors resize, pad, crop and cut pictures in ways of their own. None of this is worked out again
here: a drawing is sent through the very processor that prepares pictures. From patches to tokens it
goes through the model's own packing. A family whose way from patches to tokens is not known is
refused.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mmlm.errors import UnsupportedModel

if TYPE_CHECKING:
    from PIL import Image
    from torch import Tensor

    from mmlm.engine.anatomy import Anatomy

__all__ = ["KNOWN", "brightness"]

KNOWN = frozenset(
    {
        "gemma3",
        "idefics3",
        "internvl",
        "llava",
        "llava_next",
        "llava_onevision",
        "paligemma",
        "qwen2_5_vl",
        "qwen3_vl",
        "smolvlm",
    }
)
"""Model types whose way from patches to tokens is checked by a test."""


def brightness(model: Any, processor: Any, drawings: Sequence[Image.Image]) -> Tensor:
    """How bright each token of a picture is in each of some drawings of it.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor.
        drawings: Colour drawings of one size, that of the picture.

    Returns:
        fp32 [drawings, 3 colours, tokens]: 0 where black, 1 where white; sharp resampling may
        overshoot at borders. Padding counts as black, and so do tokens that show nothing (row
        ends). What the processor crops away is in no token.

    Raises:
        UnsupportedModel: For a family whose way from patches to tokens is not known.
    """
    import torch
    from PIL import Image

    from mmlm.engine.anatomy import Anatomy

    anatomy = Anatomy(model)
    if anatomy.family_name not in KNOWN:
        raise _unknown(anatomy, "its way from patches to tokens is not known")
    size = drawings[0].size
    black = _pixels(processor, Image.new("RGB", size))
    white = _pixels(processor, Image.new("RGB", size, (255,) * 3))
    reach = white["pixel_values"] - black["pixel_values"]
    # Padding is the same in all of them, and so becomes 0.
    reach = reach.where(reach != 0, torch.ones(()))
    patches = []
    for drawing in drawings:  # one by one: pixels of a large picture are many
        level = (_pixels(processor, drawing)["pixel_values"] - black["pixel_values"]) / reach
        patches.append(_to_patches(anatomy, level))
    tokens = int((torch.isin(black["input_ids"], torch.tensor(anatomy.image_ids))).sum())
    found = _to_tokens(anatomy, torch.cat(patches), black, tokens)
    return found.unflatten(0, (len(drawings), 3))


def _pixels(processor: Any, picture: Image.Image) -> dict[str, Tensor]:
    """What the processor makes of a drawing."""
    from mmlm.inputs import message, prepare

    return prepare(processor, [[message("user", "", 1)]], [[picture]])


def _to_patches(anatomy: Anatomy, level: Tensor) -> Tensor:
    """Means over the pixels of each patch, by colour: [3, patches] or [3, tiles, patches]."""
    from torch.nn import functional

    if level.ndim == 2:  # flattened patches, colour after colour
        return level.unflatten(-1, (3, -1)).mean(-1).T
    patch = anatomy.config.vision_config.patch_size
    side = patch if isinstance(patch, int) else patch[0]
    colours = level.flatten(0, -4).transpose(0, 1)  # [3, tiles, height, width]
    return functional.avg_pool2d(colours, side).flatten(2)


def _to_tokens(anatomy: Anatomy, parts: Tensor, inputs: dict[str, Tensor], tokens: int) -> Tensor:
    """Parts of patches as parts of tokens, in the order of the sequence."""
    if parts.ndim == 2:  # patches that become one token stand side by side
        merge = anatomy.config.vision_config.spatial_merge_size
        found = parts.view(len(parts), -1, merge * merge).mean(-1)
    elif anatomy.family.sizes == "packed":
        found = _packed(anatomy, parts, inputs)
    else:
        found = _merged(anatomy, parts, tokens)
    if found.shape[1] != tokens:
        raise _unknown(anatomy, f"{found.shape[1]} cells are expected for {tokens} image tokens")
    return found


def _packed(anatomy: Anatomy, parts: Tensor, inputs: dict[str, Tensor]) -> Tensor:
    """Through the model's own packing of tiles: unpadded, resized, with row ends."""
    config = anatomy.config
    name = (
        "vision_aspect_ratio"
        if hasattr(config, "vision_aspect_ratio")
        else "vision_feature_select_strategy"
    )
    features, _ = anatomy.composite.pack_image_features(
        [parts.permute(1, 2, 0)],
        inputs["image_sizes"],
        image_newline=parts.new_zeros(len(parts)),
        **{name: getattr(config, name)},
    )
    packed: Tensor = features[0].T
    return packed


def _merged(anatomy: Anatomy, parts: Tensor, tokens: int) -> Tensor:
    """Square blocks of each tile's patches become one token."""
    from torch.nn import functional

    regions, tiles, patches = parts.shape
    side, short = math.isqrt(patches), math.isqrt(tokens // tiles)
    if side * side != patches or short * short * tiles != tokens or side % short:
        raise _unknown(anatomy, f"{tiles} x {patches} patches become {tokens} tokens")
    grid = parts.reshape(regions, tiles, side, side)
    return functional.avg_pool2d(grid, side // short).flatten(1)


def _unknown(anatomy: Anatomy, reason: str) -> UnsupportedModel:
    return UnsupportedModel(
        f"Which image token of {anatomy.family_name} shows which part of a picture is not known: "
        f"{reason}.",
        advice="Do without a map of the picture (how much attention an image gets in all needs "
        f"none), or choose a model of one of these types: {', '.join(sorted(KNOWN))}.",
    )
