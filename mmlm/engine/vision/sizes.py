"""How many positions each picture of a prompt takes, for families that write pictures side by side.

Without it two pictures with no token between them would look like one (see
:meth:`mmlm.engine.layout.TokenLayout.with_images`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmlm.engine.layout import TokenLayout
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy

__all__ = ["pictures_of_tiles", "tell_images_apart"]


def tell_images_apart(
    anatomy: Anatomy, layout: TokenLayout, vision: Mapping[str, Any], copies: int = 1
) -> TokenLayout:
    """The layout with its images told apart by their sizes, where the family needs that.

    Args:
        anatomy: The model's parts.
        layout: As read from the token ids; each of the processor's rows ``copies`` times.
        vision: Pixel inputs as the processor made them.
        copies: How often each of the processor's rows stands in the batch (beams).

    Raises:
        LayoutError: If the pictures' sizes do not add up to the placeholders.
    """
    pixels, kind = vision.get("pixel_values"), anatomy.family.sizes
    if pixels is None or kind == "runs" or "pixel_values_videos" in vision:
        return layout
    one = layout.gather_rows(slice(None, None, copies))
    if kind == "packed":
        sizes = _packed(anatomy, vision)
    elif "image_sizes" in vision:  # a tower of any resolution: a token ends every line of patches
        return layout
    else:
        each = int(one.visual.sum()) // len(pixels)
        sizes = torch.full((len(pixels),), each, device=one.seg.device)
    told = one.with_images(sizes)
    return told.expand(copies) if copies > 1 else told


def pictures_of_tiles(anatomy: Anatomy, vision: Mapping[str, Any]) -> list[int] | None:
    """The picture of each tile, for families that pack tiles by each picture's size; else None.

    Raises:
        LayoutError: If the pictures' sizes are missing.
    """
    if anatomy.family.sizes != "packed":
        return None
    tiles = _tiles_of_pictures(anatomy, vision)
    return [picture for picture, n in enumerate(tiles) for _ in range(n)]


def _tiles_of_pictures(anatomy: Anatomy, vision: Mapping[str, Any]) -> list[int]:
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    if vision.get("image_sizes") is None:
        raise LayoutError(
            "Pictures are cut into tiles and packed by their sizes, but image_sizes is missing.",
            advice="Pass the processor's image_sizes along with pixel_values.",
        )
    config = anatomy.config
    side = config.vision_config.image_size
    counts = vision.get("batch_num_images")
    several = [int(n) > 1 for n in (() if counts is None else counts) for _ in range(int(n))]
    found = []
    for i, size in enumerate(vision["image_sizes"]):
        # OneVision cuts a picture into tiles only where it is alone in its row.
        alone = not (several and several[i])
        tiles = image_size_to_num_patches(size, config.image_grid_pinpoints, side) if alone else 1
        found.append(int(tiles))
    return found


def _packed(anatomy: Anatomy, vision: Mapping[str, Any]) -> Tensor:
    """Sizes by the model's own packing rule, run on features of width one."""
    config, composite = anatomy.config, anatomy.composite
    patches = (config.vision_config.image_size // config.vision_config.patch_size) ** 2
    features = [torch.zeros(n, patches, 1) for n in _tiles_of_pictures(anatomy, vision)]
    options: dict[str, Any] = (
        {"vision_aspect_ratio": config.vision_aspect_ratio}
        if hasattr(config, "vision_aspect_ratio")
        else {"vision_feature_select_strategy": config.vision_feature_select_strategy}
    )
    _, sizes = composite.pack_image_features(
        features, vision["image_sizes"], image_newline=torch.zeros(1), **options
    )
    return sizes
