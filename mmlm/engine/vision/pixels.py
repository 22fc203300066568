"""Pixels of single pictures inside a batch of model inputs, and the noise that is put on them.

Processors lay pictures out in three ways: flattened patches of all pictures with a grid that
counts them, tiles of each picture padded to the most of the batch, or one entry per picture (or
tile). What happens to a picture here must not depend on the batch around it.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy

__all__ = [
    "NOISE_STEPS",
    "by_picture",
    "draw_diffusion_noise",
    "draw_uniform_noise",
    "put_back",
    "signal_kept",
]

NOISE_STEPS = 1000
"""Steps of the forward diffusion in :func:`signal_kept`."""


def by_picture(pixels: Tensor, grid: Tensor | None) -> list[Tensor]:
    """The pictures of a batch, each without the batch's padding.

    Args:
        pixels: [n, patch] flattened patches, [images, tiles, C, H, W] or [images, C, H, W].
        grid: [images, 3], patches of each picture in time, height and width; None without.

    Returns:
        Per picture [n, patch] or [tiles, C, H, W].
    """
    if grid is not None:
        return list(pixels.split(grid.prod(-1).tolist()))
    if pixels.ndim == 5:
        return [picture[: _tiles(picture)] for picture in pixels]
    return [picture[None] for picture in pixels]


def put_back(pixels: Tensor, grid: Tensor | None, pictures: Sequence[Tensor]) -> Tensor:
    """A batch of pixels with other pictures in it; the opposite of :func:`by_picture`."""
    if grid is not None or pixels.ndim != 5:
        return torch.cat([p.to(pixels) for p in pictures])
    batch = torch.zeros_like(pixels)
    for row, picture in zip(batch, pictures, strict=True):
        row[: len(picture)] = picture
    return batch


def draw_uniform_noise(anatomy: Anatomy, picture: Tensor, seed: int) -> Tensor:
    """Uniform noise in [0, 1) for one picture, seeded with ``seed`` and the picture's pixels.

    On the CPU, so that every device gets the same noise.
    """
    generator = torch.Generator().manual_seed(_fingerprint(picture, seed))
    if picture.ndim == 2 and anatomy.family.frames_in_patch:
        frames, side = _patch(anatomy)
        shape = (len(picture), picture.shape[1] // frames)
        return _in_every_frame(torch.rand(shape, generator=generator), frames, side)
    return torch.rand(picture.shape, generator=generator)


def draw_diffusion_noise(
    anatomy: Anatomy, pixels: Tensor, grid: Tensor | None, seed: int
) -> Tensor:
    """Standard normal noise of the shape of ``pixels``, the same for all pictures of one size.

    Zero on tiles that only pad the batch: some families tell padding by its zeros.
    """

    def draw(shape: Sequence[int], stream: int = 0) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1009 + stream)
        return torch.randn(tuple(shape), generator=generator)

    if anatomy.family.frames_in_patch and grid is not None:
        frames, side = _patch(anatomy)
        width = pixels.shape[1] // frames
        eps = torch.cat([draw((n, width)) for n in grid.prod(-1).tolist()])
        eps = _in_every_frame(eps, frames, side)
    elif pixels.ndim == 5:  # [images, tiles, C, H, W]; tiles are padded to the batch's most
        eps = torch.stack([draw(pixels.shape[2:], i) for i in range(pixels.shape[1])])
        eps = eps * pixels.flatten(2).ne(0).any(-1).cpu()[..., None, None, None]
    else:  # [images or tiles, C, H, W]
        eps = draw(pixels.shape[1:])
    return eps.to(pixels.device)


@functools.cache
def signal_kept(step: int) -> float:
    """abar_t of the forward diffusion: the share of the image's variance left at step t.

    ``beta_s = sigmoid(linspace(-6, 6, 1000)) * (0.5e-2 - 1e-5) + 1e-5`` and
    ``abar_t = prod_{s <= t} (1 - beta_s)``, as in the code of VCD's and POVID's authors.
    """
    ramp = torch.linspace(-6, 6, NOISE_STEPS, dtype=torch.float64)
    beta = ramp.sigmoid() * (0.5e-2 - 1e-5) + 1e-5
    return float((1 - beta)[: step + 1].prod())


def _tiles(picture: Tensor) -> int:
    """Number of a picture's own tiles; the batch's padding is zero and stands behind them."""
    filled = picture.flatten(1).ne(0).any(-1).nonzero()
    return int(filled[-1]) + 1 if len(filled) else 0


def _patch(anatomy: Anatomy) -> tuple[int, int]:
    config = anatomy.config.vision_config
    return config.temporal_patch_size, config.patch_size


def _in_every_frame(noise: Tensor, frames: int, side: int) -> Tensor:
    """Noise [n, C * p * p] as patches [n, C * frames * p * p] of a still picture."""
    single = noise.unflatten(1, (-1, 1, side, side))
    return single.expand(-1, -1, frames, -1, -1).flatten(1)


def _fingerprint(picture: Tensor, seed: int) -> int:
    digest = hashlib.sha256(str(seed).encode())
    digest.update(picture.detach().float().cpu().contiguous().numpy().tobytes())
    return int.from_bytes(digest.digest()[:8], "big") >> 1
