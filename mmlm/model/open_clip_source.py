"""Models of open_clip from a name, a folder or an id, and their pictures as stock processors do."""

from __future__ import annotations

from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, UnsupportedModel

if TYPE_CHECKING:
    from torch import nn
    from transformers import BaseImageProcessor

__all__ = ["image_processor", "open_clip_model"]

RANDOM = "random"
RESAMPLING = {"bilinear": 2, "bicubic": 3}


def open_clip_model(name: str, weights: str | Path | None = None) -> nn.Module:
    """Loads a whole model of open_clip, in float32.

    Args:
        name: a folder with open_clip_config.json and weights; an id of the hub; or a name of
            open_clip's own list, e.g. "ViT-L-14-336-quickgelu".
        weights: for such a name: a file, a tag of open_clip's list, or "random". OpenAI's weights
            need the names that end in "-quickgelu".

    Raises:
        InputError: nothing of that name, weights that do not fit or were forgotten.
    """
    import open_clip

    settings: dict[str, Any] = {}
    if Path(name).expanduser().is_dir():
        _refuse_weights(name, weights)
        source = f"local-dir:{Path(name).expanduser()}"
    elif "/" in name:
        _refuse_weights(name, weights)
        source = f"hf-hub:{name}"
    else:
        _check_name(name, weights)
        source = name
        if weights != RANDOM:
            settings = {
                "pretrained": str(weights),
                "force_preprocess_cfg": _preprocessing(name, str(weights)),
            }
    try:
        return open_clip.create_model(
            source, require_pretrained=weights != RANDOM, **settings
        ).eval()
    except (RuntimeError, OSError, ValueError, KeyError, UnpicklingError) as error:
        raise InputError(
            f"open_clip cannot load {name!r}"
            + (f" with weights {str(weights)!r}" if weights else "")
            + f": {str(error).splitlines()[0]}",
            advice="Name and weights must belong together; a TorchScript file of OpenAI is read by "
            "open_clip.load_openai_model, whose model can be handed over as an object.",
        ) from error


def _refuse_weights(name: str, weights: str | Path | None) -> None:
    if weights is not None:
        raise InputError(
            f"open_clip:{name} brings its weights, and {str(weights)!r} was given besides",
            advice="Leave the weights away, or give a name of open_clip's own list.",
        )


def _check_name(name: str, weights: str | Path | None) -> None:
    import difflib

    import open_clip

    if name not in open_clip.list_models():
        near = difflib.get_close_matches(name, open_clip.list_models(), n=3)
        raise InputError(
            f"open_clip has no model {name!r}, and there is no such folder",
            advice=f"Did you mean {' or '.join(near)}?" if near else "See open_clip.list_models().",
        )
    tags = open_clip.list_pretrained_tags_by_model(name)
    if weights is None:
        raise InputError(
            f"open_clip:{name} is a name without weights",
            advice=f"Give a file, 'random', or a tag: {', '.join(tags) or 'there are none'}.",
        )
    if weights != RANDOM and weights not in tags and not Path(weights).is_file():
        raise InputError(
            f"weights {str(weights)!r} of open_clip:{name} are neither a file nor a tag",
            advice=f"Tags of {name}: {', '.join(tags) or 'none'}.",
        )
    if weights in tags:
        # open_clip only warns; but with another activation it is another network.
        quick = [
            bool(cfg.get("quick_gelu"))
            for cfg in (
                open_clip.get_pretrained_cfg(name, weights),
                open_clip.get_model_config(name),
            )
        ]
        if quick[0] != quick[1]:
            raise InputError(
                f"the weights {weights!r} were trained {'with' if quick[0] else 'without'} quick "
                f"GELU, and open_clip:{name} is the network {'without' if quick[0] else 'with'} it",
                advice="Take the name that ends in -quickgelu for OpenAI's weights, and the other "
                "for weights trained without.",
            )


def _preprocessing(name: str, weights: str) -> dict[str, Any]:
    """How pictures are prepared for weights from a file.

    open_clip knows it for tags only. A file gets what all tags of its name agree on: SigLIP's
    pictures, for example, are squeezed to a square and have other means than CLIP's.
    """
    import open_clip

    wanted = ("mean", "std", "interpolation", "resize_mode")
    if not Path(weights).is_file():
        return {}
    tags = open_clip.list_pretrained_tags_by_model(name)
    known = [open_clip.get_pretrained_cfg(name, tag) for tag in tags]
    kinds = {tuple(cfg.get(key) for key in wanted) for cfg in known}
    if len(kinds) > 1:
        raise InputError(
            f"pictures for {name} are prepared differently for its tags {', '.join(tags)}, and "
            f"the file {weights!r} does not say whose weights it holds",
            advice="Put the file into a folder with an open_clip_config.json, or give the tag.",
        )
    found = dict(zip(wanted, kinds.pop(), strict=True)) if kinds else {}
    return {key: value for key, value in found.items() if value is not None}


def image_processor(module: nn.Module, size: int) -> BaseImageProcessor:
    """The stock image processor that prepares pictures as open_clip does.

    Args:
        module: a model of open_clip, or its image tower.
        size: side of the pictures, pixels.

    Raises:
        UnsupportedModel: the tower wants its pictures padded, which no CLIP processor does.
    """
    from open_clip.transform import PreprocessCfg
    from transformers import CLIPImageProcessor

    visual = getattr(module, "visual", module)
    given = dict(getattr(visual, "preprocess_cfg", {}) or {})
    cfg = PreprocessCfg(**{**given, "size": size})
    if cfg.resize_mode not in ("shortest", "squash") or cfg.interpolation not in RESAMPLING:
        raise UnsupportedModel(
            f"the tower's pictures are resized by {cfg.resize_mode!r}, {cfg.interpolation!r}",
            advice="Supported are 'shortest' and 'squash' with bicubic or bilinear; or give an "
            "image_processor.",
        )
    square = {"height": size, "width": size}
    crops = cfg.resize_mode == "shortest"
    return CLIPImageProcessor(
        size={"shortest_edge": size} if crops else square,
        crop_size=square,
        do_center_crop=crops,
        resample=RESAMPLING[cfg.interpolation],
        image_mean=list(cfg.mean),
        image_std=list(cfg.std),
    )
