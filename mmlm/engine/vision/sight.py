"""The ``vision_layer`` site: what methods see of the pictures before the decoder starts.

``generate`` encodes the pictures before the first forward pass; a plain call would do it within.
:func:`encode_first` makes both the same: pictures are encoded first, once, and the features go into
the pass as ``mm_encoder_outputs``. What a method makes of the tower's states is therefore known
when its ``begin`` is called.

A :class:`Sight` is one such pass. It leads from patches to positions of the sequence through the
model's own packing: marks on patches are sent through the very function that packs the features
(unpadding, row ends, tiles of different pictures), instead of working its result out again.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional

from mmlm.engine.combine import chain
from mmlm.engine.shadow import shadow
from mmlm.engine.vision.sizes import pictures_of_tiles
from mmlm.engine.vision.tower_pass import TowerPass
from mmlm.engine.vision.tower_pruning import install_tower_pruning
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["Sight", "encode_first", "install_vision", "pack_marks"]

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


@dataclass
class Sight:
    """One pass of pictures through the vision tower.

    Attributes:
        states: Each method's own state of this pass, by its number.
        features: Number of image features over all pictures, after packing.
        tiles: Tiles of each picture, where the model packs features at all.
        per_tile: Features of one tile before packing, where the model packs features at all.
        pack_features: The model's packing function with everything but the features.
        before: Features [T, p, D] before packing; T = 1 where all pictures come in one row.
        tower: What has left within the tower, if a method has a say there.
    """

    states: list[Any]
    features: int = 0
    tiles: list[int] = field(default_factory=list)
    per_tile: int = 0
    pack_features: Callable[..., Any] | None = None
    before: Tensor | None = None
    tower: TowerPass | None = None

    def merge(self, values: Float[Tensor, "T P"]) -> Float[Tensor, "T p"]:
        """Values of patches averaged over the patches that become one feature.

        Towers whose projector merges patches do so in square blocks of their grid.

        Raises:
            LayoutError: If the patches are no whole number of square blocks.
        """
        tiles, patches = values.shape
        merged = self.per_tile or self.features // tiles
        if merged == patches:
            return values
        side, short = math.isqrt(patches), math.isqrt(merged)
        if side * side != patches or short * short != merged or side % short:
            raise LayoutError(
                f"{patches} patches per tile become {merged} features, which is not a merge of "
                "square blocks.",
                advice="Methods that select patches cannot run on this model.",
            )
        grid = values.view(tiles, 1, side, side)
        return functional.avg_pool2d(grid, side // short).flatten(1)

    def pack(self, marks: Float[Tensor, "T p C"]) -> Float[Tensor, "n C"]:
        """Marks on features in the order in which the features stand in the sequence.

        Positions that hold no patch (row ends) get 0. Where the model resizes its features, marks
        are resized alike and become fractions.

        Raises:
            LayoutError: If tiles and features disagree.
        """
        if self.pack_features is None:
            packed = marks.flatten(0, 1)
        else:
            packed = torch.cat(self.pack_features(marks.split(self.tiles)))
        if packed.shape[0] != self.features:
            raise LayoutError(
                f"{marks.shape[0]} tiles with {marks.shape[1]} marks each give {packed.shape[0]} "
                f"features, but the model made {self.features}.",
                advice="Methods that select patches cannot run on this model.",
            )
        return packed


def encode_first(session: Session, inputs: dict[str, Any]) -> dict[str, Any]:
    """The inputs of a prompt's first pass with its pictures encoded, as ``generate`` hands them."""
    composite = session.anatomy.composite
    given = [m for m, name in _PIXELS.items() if inputs.get(name) is not None and len(inputs[name])]
    if not given or "mm_encoder_outputs" not in session.parameters:
        return inputs
    encoded = {}
    for modality in given:
        encode = getattr(composite, f"get_{modality}_features")
        names = inspect.signature(encode).parameters
        wanted = {k: v for k, v in inputs.items() if k in names and v is not None}
        encoded[modality] = encode(**wanted, return_dict=True)
    kept = {k: v for k, v in inputs.items() if k not in _PIXELS.values()}
    return {**kept, "mm_encoder_outputs": encoded}


def install_vision(session: Session, stack: ExitStack) -> None:
    """Watches the encoding of pictures and hooks the tower's blocks.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    looking = session.users("vision_layer")
    pruning = session.users("patches")
    choosing = sorted({*session.users("visual_tokens"), *pruning})
    users = sorted({*looking, *choosing})
    if not users:
        return
    composite: Any = session.anatomy.composite
    shadow(composite, "get_image_features", _watched_encoding(session, users, pruning), stack)
    if hasattr(composite, "get_video_features"):
        shadow(composite, "get_video_features", _filming(session), stack)
    install_tower_pruning(session, stack)  # first: what follows sees features of all places
    if hasattr(composite, "pack_image_features"):
        shadow(composite, "pack_image_features", _watched_packing(session), stack)
    if choosing:
        keep = _projector_hook(session)
        stack.callback(session.anatomy.projector.register_forward_hook(keep).remove)
    for number, block in enumerate(session.anatomy.tower_blocks if looking else ()):
        hook = _block_hook(session, number, looking)
        stack.callback(block.register_forward_pre_hook(hook, with_kwargs=True).remove)


def _watched_encoding(
    session: Session, users: list[int], pruning: list[int]
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def get_image_features(*args: Any, **kwargs: Any) -> Any:
            if session.quiet or session.filming:
                return original(*args, **kwargs)
            sight = Sight(states=[None] * len(session.methods))
            for i in users:
                sight.states[i] = session.methods[i].begin_vision(session.anatomy)
            if pruning:
                given = signature.bind_partial(*args, **kwargs).arguments
                sight.tower = _tower_pass(session, sight, given)
            session.seeing = sight
            try:
                output = original(*args, **kwargs)
            finally:
                session.seeing = None
            if sight.tower is not None:
                output = sight.tower.settle(output)
            pooled = output.pooler_output if hasattr(output, "pooler_output") else output[1]
            flat = isinstance(pooled, Tensor) and pooled.ndim == 3
            sight.features = (
                pooled.shape[0] * pooled.shape[1] if flat else sum(len(part) for part in pooled)
            )
            if sight.before is None and not flat:
                # All pictures in one row. A tower with windows shuffles its patches and puts the
                # features in order only after the projector, so these are the ones in order.
                sight.before = torch.cat(list(pooled))[None]
            if sight.tower is not None and session.pooling is None:
                _unmix(session, sight, output)
            session.sight = sight
            return output

        return get_image_features

    return wrap


def _filming(session: Session) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Some families encode videos by their own function for pictures; no method sees these."""

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        def get_video_features(*args: Any, **kwargs: Any) -> Any:
            session.filming = True
            try:
                return original(*args, **kwargs)
            finally:
                session.filming = False

        return get_video_features

    return wrap


def _unmix(session: Session, sight: Sight, output: Any) -> None:
    """Divides features that a model resizes by the share of them whose patches are left.

    A resized feature is a mean over neighbours, in which what has left would count as zeros.
    """
    features = None if sight.tower is None else sight.tower.features
    # The only family that resizes features says by this entry when.
    if features is None or not hasattr(session.anatomy.config, "vision_aspect_ratio"):
        return
    share = sight.pack(features.float()[..., None])[:, 0]
    mixed = (share > 0) & (share < 1)
    factor = torch.where(mixed, 1 / share.clamp(min=1e-6), 1)
    parts = output.pooler_output
    factors = factor.split([len(part) for part in parts])
    output.pooler_output = [
        part * own[:, None].to(part.dtype) for part, own in zip(parts, factors, strict=True)
    ]


def _tower_pass(session: Session, sight: Sight, given: dict[str, Any]) -> TowerPass:
    """A pass through a tower that may lose patches.

    Raises:
        LayoutError: If it is not known which patches will make the features.
    """
    anatomy = session.anatomy
    given = {**given, **given.get("kwargs", {})}
    layer = given.get("vision_feature_layer")
    configured = getattr(anatomy.config, "vision_feature_layer", None)
    if layer is not None and layer != configured:
        raise LayoutError(
            f"Features of layer {layer!r} are asked for, while the model's configuration says "
            f"{configured!r}, by which a method chooses where patches leave.",
            advice="Change config.vision_feature_layer instead.",
        )
    return TowerPass(session, sight, pictures_of_tiles(anatomy, given), given.get("image_grid_thw"))


def _projector_hook(session: Session) -> Callable[..., Any]:
    """Hook of the projector: keeps its output for the methods that choose features."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if session.seeing is not None and output.ndim == 3:
            session.seeing.before = output

    return hook


def _watched_packing(session: Session) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def pack_image_features(*args: Any, **kwargs: Any) -> Any:
            sight = session.seeing
            if sight is not None:
                arguments = signature.bind(*args, **kwargs).arguments
                features = arguments.pop("image_features")
                sight.tiles = [part.shape[0] for part in features]
                sight.per_tile = features[0].shape[1]
                sight.pack_features = functools.partial(pack_marks, original, arguments)
            return original(*args, **kwargs)

        return pack_image_features

    return wrap


def pack_marks(
    original: Callable[..., Any], arguments: Mapping[str, Any], marks: Sequence[Tensor]
) -> list[Tensor]:
    """Packs marks [T, p, C] of each picture the way its features were packed; row ends get 0.

    Args:
        original: The model's packing function.
        arguments: What it was called with, but for the features.
        marks: One tensor for each picture.
    """
    changed = dict(arguments)
    if changed.get("image_newline") is not None:
        changed["image_newline"] = marks[0].new_zeros(marks[0].shape[-1])
    packed, _ = original(image_features=list(marks), **changed)
    return list(packed)


def _block_hook(session: Session, number: int, users: list[int]) -> Callable[..., Any]:
    """Pre-hook of a tower block; towers that pack all pictures into one row give T = 1."""

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        sight = session.seeing
        if sight is None:  # an auxiliary pass, or a video
            return None
        x = args[0] if args else kwargs["hidden_states"]
        tiles = x if x.ndim == 3 else x[None]

        def edit(i: int) -> Callable[[Tensor], Tensor | None]:
            method, state = session.methods[i], sight.states[i]
            return lambda y: method.vision_layer(state, number, y)

        new = chain((edit(i) for i in users), tiles)
        if new is tiles:
            return None
        new = new if x.ndim == 3 else new[0]
        if args:
            return (new, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": new}

    return hook
