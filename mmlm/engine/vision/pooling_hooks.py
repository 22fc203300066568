"""Watches the encoding of pictures and videos for :mod:`mmlm.engine.vision.pooling`."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmlm.engine.shadow import shadow
from mmlm.engine.vision.originals import Pictures
from mmlm.engine.vision.pooling import Pooling
from mmlm.engine.vision.sight import pack_marks

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["MODALITIES", "install_doors", "install_pooling"]

MODALITIES = ("image", "video")


def install_pooling(session: Session, stack: ExitStack) -> None:
    """Hooks the projector if a method pools pictures and videos or wants the originals.

    Before all others who hook it: what enters it is pooled first.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    users = session.users("pool")
    session.pooling = None
    if not users:
        return
    pooling = session.pooling = Pooling(session, users)
    composite: Any = session.anatomy.composite
    if hasattr(composite, "pack_image_features"):
        shadow(composite, "pack_image_features", _packing(pooling), stack)
    projector = session.anatomy.projector

    def enter(module: nn.Module, args: tuple[Any, ...]) -> Any:
        one = args and isinstance(args[0], Tensor)
        if pooling.seeing is None or not one:
            return None
        return (pooling.before(args[0]), *args[1:])

    def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> Any:
        return None if pooling.seeing is None else pooling.after(module, output)

    stack.callback(projector.register_forward_pre_hook(enter).remove)
    stack.callback(projector.register_forward_hook(leave).remove)


def install_doors(session: Session, stack: ExitStack) -> None:
    """Watches the encoding itself, around everybody else who does.

    Args:
        session: The attachment.
        stack: Takes everything back on exit.
    """
    if session.pooling is None:
        return
    composite: Any = session.anatomy.composite
    for modality in MODALITIES:
        name = f"get_{modality}_features"
        if hasattr(composite, name):
            shadow(composite, name, _encoding(session.pooling, modality), stack)


def _encoding(
    pooling: Pooling, modality: str
) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    session = pooling.session

    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def encode(*args: Any, **kwargs: Any) -> Any:
            if pooling.seeing is not None:  # one kind of pictures is encoded as the other
                return original(*args, **kwargs)
            given = signature.bind(*args, **kwargs).arguments
            grid = given.get(f"{modality}_grid_thw")
            pictures = Pictures(modality, _merged(session, grid, given.get("image_sizes")))
            for i in pooling.users:
                pictures.states[i] = session.methods[i].begin_vision(session.anatomy)
            pooling.seeing = pictures
            try:
                output = original(*args, **{**kwargs, "return_dict": True})
                pooling.finish(pictures, output)
            finally:
                pooling.seeing = None
            if modality == "video" and not pictures.grids:
                _frames_of_videos(pictures, given, session)
            if not session.quiet:
                pooling.passes[modality] = pictures
            return output

        return encode

    return wrap


def _frames_of_videos(pictures: Pictures, given: Mapping[str, Any], session: Session) -> None:
    """How a model without grids lays out the frames of its videos: OneVision halves each one."""
    composite = session.anatomy.composite
    videos, times = given["pixel_values_videos"].shape[:2]
    pictures.tiles = [times] * videos

    def pack(marks: Tensor) -> list[Tensor]:
        halved = composite.apply_pooling(marks)
        lines = halved.reshape(videos, -1, marks.shape[-1])
        return [torch.cat([x, x.new_zeros(1, x.shape[-1])]) for x in lines]  # a line end follows

    pictures.pack = pack


def _packing(pooling: Pooling) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def wrap(original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        def pack_image_features(*args: Any, **kwargs: Any) -> Any:
            pictures = pooling.seeing
            if pictures is not None:
                arguments = dict(signature.bind(*args, **kwargs).arguments)
                pictures.tiles = [part.shape[0] for part in arguments.pop("image_features")]

                def pack(marks: Tensor) -> list[Tensor]:
                    return pack_marks(original, arguments, marks.split(pictures.tiles))

                pictures.pack = pack
            return original(*args, **kwargs)

        return pack_image_features

    return wrap


def _merged(session: Session, grid: Tensor | None, sizes: Any) -> list[tuple[int, int, int]]:
    """Grids of features where the tower takes pictures of any size; else empty.

    Args:
        session: The attachment.
        grid: Frames, and patches down and across, of each picture, if the model is given them.
        sizes: Height and width in pixels of each picture, likewise.
    """
    anatomy = session.anatomy
    if grid is not None:
        side = int(getattr(anatomy.tower, "spatial_merge_size", 1))
        return [(t, h // side, w // side) for t, h, w in grid.tolist()]
    if sizes is None or hasattr(anatomy.composite, "pack_image_features"):
        return []
    side = anatomy.tower.patch_size * int(getattr(anatomy.config, "spatial_merge_size", 1))
    return [(1, int(h) // side, int(w) // side) for h, w in torch.as_tensor(sizes).tolist()]
