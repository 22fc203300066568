"""Vision towers for a new LLaVA: where they come from, and what one makes of a picture.

A tower is a vision model of transformers (a folder, an id, or an object) or an image tower of
open_clip. What LLaVA must know about it, how many tokens a picture becomes and how many of them
stand before the patches, is measured on a picture, not taken from names.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, UnsupportedModel
from mmlm.model.checkpoint import refuse_unfilled

if TYPE_CHECKING:
    from torch import nn
    from transformers import BaseImageProcessor, PreTrainedModel

__all__ = ["Tower", "load_tower"]

OPEN_CLIP = "open_clip:"
OPEN_CLIP_CONFIG = "open_clip_config.json"
MOST_PREFIX_TOKENS = 16
"""Class token, distillation token, registers: more extra tokens than this are no known tower's."""


@dataclass(frozen=True)
class Tower:
    """A vision tower ready for a LLaVA.

    Attributes:
        model: of a class that transformers builds from the model's config.
        image_processor: makes the tower's pixels of a picture.
        patch_size: side of a patch, pixels.
        n_patches: patches of one picture.
        n_prefix: tokens before them: 0 (SigLIP), 1 for a class token (CLIP, DINOv2), more with
            registers.
    """

    model: PreTrainedModel
    image_processor: BaseImageProcessor
    patch_size: int
    n_patches: int
    n_prefix: int


def load_tower(
    vision: str | Path | nn.Module,
    *,
    weights: str | Path | None = None,
    image_processor: str | Path | BaseImageProcessor | None = None,
    layer: int = -2,
) -> Tower:
    """Takes or loads a vision tower, and measures it.

    Args:
        vision: a folder or an id of transformers (a tower, or a whole CLIP or SigLIP, whose tower
            is taken); "open_clip:" and a name, a folder or an id of open_clip; or a model object.
        weights: only for a name of open_clip: a file, a tag such as "openai", or "random".
        image_processor: instead of the tower's own.
        layer: hidden state that will be used, as in `LlavaConfig.vision_feature_layer`.

    Returns:
        The tower in float32 and evaluation mode.

    Raises:
        InputError: not found, or pictures and tower do not fit together.
        MissingTensors: the checkpoint does not fill the tower.
        UnsupportedModel: stock LLaVA cannot hold it.
    """
    import torch
    from transformers import PreTrainedModel

    brings_weights = True
    if isinstance(vision, PreTrainedModel):
        model, own = vision, partial(_published_processor, vision)
    elif isinstance(vision, torch.nn.Module):
        model, own = _from_open_clip(vision)
    elif name := _open_clip_name(str(vision)):
        from mmlm.model.open_clip_source import open_clip_model

        model, own = _from_open_clip(open_clip_model(name, weights))
        brings_weights = False
    else:
        model, own = _from_transformers(str(vision)), partial(_image_processor, str(vision))
    if weights is not None and brings_weights:
        raise InputError(
            f"weights {str(weights)!r} were given with a tower that brings its own",
            advice="Give weights only with a name of open_clip, e.g. open_clip:ViT-L-14-336.",
        )
    if isinstance(image_processor, str | Path):
        image_processor = _image_processor(str(image_processor))
    return _measured(model.float().eval(), image_processor or own(), layer)


def _open_clip_name(vision: str) -> str:
    """What stands behind "open_clip:", or a folder that only open_clip reads; else nothing."""
    folder = Path(vision).expanduser()
    if (folder / OPEN_CLIP_CONFIG).is_file() and not (folder / "config.json").is_file():
        return str(folder)
    return vision.removeprefix(OPEN_CLIP) if vision.startswith(OPEN_CLIP) else ""


def _from_open_clip(module: nn.Module) -> tuple[PreTrainedModel, Callable[[], BaseImageProcessor]]:
    from mmlm.model.open_clip_source import image_processor
    from mmlm.model.open_clip_tower import from_open_clip

    model = from_open_clip(module)
    return model, partial(image_processor, module, model.config.image_size)


def _from_transformers(name: str) -> PreTrainedModel:
    from transformers import AutoConfig, AutoModel

    try:
        config = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"there is no vision tower {name!r}: {str(error).splitlines()[0]}",
            advice="Give a folder or id of transformers, or open_clip:NAME with its weights.",
        ) from error
    # A whole CLIP or SigLIP: its vision part has a config and a class of its own.
    config = getattr(config, "vision_config", config)
    try:
        model, info = AutoModel.from_pretrained(name, config=config, output_loading_info=True)
    except (OSError, ValueError) as error:
        raise InputError(
            f"the tower {name!r} cannot be loaded as a {config.model_type!r}: "
            f"{str(error).splitlines()[0]}",
            advice="Give the checkpoint of a vision transformer such as CLIP, SigLIP or DINOv2.",
        ) from error
    advice = "Give the checkpoint of the vision tower itself, or of a whole CLIP or SigLIP."
    refuse_unfilled(name, model, info, advice)
    return model


def _image_processor(name: str) -> BaseImageProcessor:
    from transformers import AutoImageProcessor

    try:
        return AutoImageProcessor.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{name!r} has no image processor that can be read: {str(error).splitlines()[0]}",
            advice="Give image_processor: a folder or id with a preprocessor_config.json.",
        ) from error


def _published_processor(model: Any) -> BaseImageProcessor:
    """The processor that a family was published with, at the size of a tower given as an object.

    Raises:
        InputError: of this family every checkpoint has its own.
    """
    from transformers import CLIPImageProcessor, SiglipImageProcessor

    size = model.config.image_size
    square = {"height": size, "width": size}
    if model.config.model_type == "clip_vision_model":
        return CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square)
    if model.config.model_type == "siglip_vision_model":
        return SiglipImageProcessor(size=square)
    raise InputError(
        f"how pictures are prepared for this {type(model).__name__} is not known",
        advice="Give image_processor with it, or the folder or id that the tower came from.",
    )


def _measured(model: Any, image_processor: Any, layer: int) -> Tower:
    """Shows the tower a picture and counts."""
    import torch
    from PIL import Image

    unsupported = f"LlavaForConditionalGeneration cannot hold a {type(model).__name__}"
    advice = "Supported are vision transformers with equal layers: CLIP, SigLIP, DINOv2, ViT ..."
    patch, width = (getattr(model.config, name, None) for name in ("patch_size", "hidden_size"))
    if not isinstance(patch, int) or not isinstance(width, int):
        raise UnsupportedModel(
            f"{unsupported}: its config names no single patch_size and hidden_size", advice=advice
        )
    # No square: a processor that keeps the shape of a picture would show here.
    picture = Image.new("RGB", (48, 32), (200, 100, 50))
    pixels = image_processor(picture, return_tensors="pt")["pixel_values"]
    try:
        with torch.no_grad():
            states = model(pixels.to(model.device), output_hidden_states=True).hidden_states
    except (TypeError, AttributeError) as error:  # wants more than pixels, or gives no states
        raise UnsupportedModel(f"{unsupported}: {error}", advice=advice) from error
    except (ValueError, RuntimeError) as error:
        raise InputError(
            f"the image processor makes {tuple(pixels.shape[-2:])} pixels, which the tower "
            f"refuses: {error}",
            advice="Give the image processor that belongs to the tower.",
        ) from error
    if not -len(states) <= layer < len(states):
        raise InputError(
            f"vision_feature_layer is {layer}; the tower has hidden states {-len(states)} to "
            f"{len(states) - 1}",
            advice="LLaVA-1.5 takes -2.",
        )
    rows, columns = (side // patch for side in pixels.shape[-2:])
    n_patches, shape = rows * columns, tuple(states[layer].shape)
    n_prefix = shape[1] - n_patches if len(shape) == 3 else -1
    if shape[-1] != width or not 0 <= n_prefix <= MOST_PREFIX_TOKENS:
        raise UnsupportedModel(
            f"{unsupported}: {n_patches} patches became a hidden state of shape {shape}",
            advice=advice,
        )
    return Tower(model, image_processor, patch, n_patches, n_prefix)
