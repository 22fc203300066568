"""Auxiliary prompts beside the main one: without its image, with a noised image.

A :class:`Branch` says *what* the auxiliary prompt is and is a frozen value: equal branches of
several methods are one. How branches are run is :mod:`mmlm.engine.auxiliary`'s business.
"""

from __future__ import annotations

import abc
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.layout import TokenLayout

__all__ = ["Branch", "BranchPrompt", "Captured", "NoImage", "Noised", "Source"]


@dataclass(frozen=True)
class Captured:
    """What one auxiliary prefill left behind.

    Attributes:
        heads: Layer -> head outputs at the last position, fp32 [B, H, d].
        layers: Layer -> output of the layer at the last position, fp32 [B, D].
    """

    heads: Mapping[int, Float[Tensor, "B H d"]]
    layers: Mapping[int, Float[Tensor, "B D"]]


@dataclass(frozen=True, eq=False)
class Source:
    """The main prompt as a branch sees it.

    Attributes:
        anatomy: The model's parts.
        layout: Roles of the B x N positions.
        input_ids: [B, N], or None if the prompt came as embeddings.
        inputs_embeds: [B, N, D], or None if the prompt came as ids.
        vision: Pixel inputs as the processor made them, before beams multiply the rows.
        copies: How often each of the processor's rows stands in the batch (beams).
        features: Visual features of the main prompt as they were merged into its embeddings,
            [B, N, D] with meaningless rows elsewhere; None before the main pass has merged them.
        processor: What made the prompt, if it is known (``attach(..., processor=...)``).
    """

    anatomy: Anatomy
    layout: TokenLayout
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    vision: Mapping[str, Any]
    copies: int
    features: Tensor | None = None
    processor: Any = None

    def embeds(self) -> Float[Tensor, "B N D"]:
        """Embeddings of all positions, placeholders included."""
        if self.inputs_embeds is not None:
            return self.inputs_embeds
        embed = self.anatomy.composite.get_input_embeddings()
        return embed(self.input_ids)


@dataclass(frozen=True, eq=False)
class BranchPrompt:
    """An auxiliary prompt, ready to run.

    Attributes:
        embeds: [B, n, D], padded on the left.
        mask: bool [B, n], True on real positions.
        positions: [B, n] text positions, or None for "the main prompt's own" (then n = N).
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor | None


class Branch(abc.ABC):
    """What an auxiliary prompt is. Subclasses are frozen dataclasses."""

    @abc.abstractmethod
    def build(self, source: Source) -> BranchPrompt:
        """Makes the auxiliary prompt from the main one."""


@dataclass(frozen=True)
class NoImage(Branch):
    """The same prompt with all images dropped and the remaining positions closed up.

    Built on the token level: visual placeholders and the tokens that frame them are deleted, the
    chat template stays. Asking a chat template for a prompt without image is not the same: some
    templates change, and some adapters skip the template altogether.
    """

    def build(self, source: Source) -> BranchPrompt:
        """Deletes visual placeholders and their frames, row by row."""
        layout = source.layout
        keep = layout.real & ~layout.visual & ~layout.frame
        longest = int(keep.sum(-1).max())
        if longest == 0 or not bool(keep.any(-1).all()):
            raise LayoutError(
                "A prompt holds nothing but images, so there is no prompt without its image.",
                advice="Ask a question with the image.",
            )
        # A stable sort moves the dropped positions to the front: padding on the left.
        index = keep.long().argsort(dim=1, stable=True)[:, -longest:]
        mask = keep.gather(1, index)
        embeds = source.embeds()
        embeds = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
        positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
        return BranchPrompt(embeds * mask[..., None].to(embeds.dtype), mask, positions)


@dataclass(frozen=True)
class Noised(Branch):
    """The same prompt with a diffusion-noised image: ``sqrt(abar) v + sqrt(1 - abar) eps``.

    ``eps`` is drawn from a generator seeded anew for every image, so that a row's result does not
    depend on its batch. Every image of one size gets the same ``eps``.

    Attributes:
        kept: ``abar``, the share of the signal's variance that is kept, in [0, 1].
        seed: Seed of ``eps``.
    """

    kept: float
    seed: int

    def build(self, source: Source) -> BranchPrompt:
        """Runs the tower on the noised pixels and puts their features in place."""
        embeds = source.embeds()
        if bool(source.layout.visual.any()):
            first = source.layout.visual[:: source.copies]
            base = embeds[:: source.copies]
            features = self._features(source).to(base.dtype)
            if int(first.sum()) != features.shape[0]:
                raise LayoutError(
                    f"The images give {features.shape[0]} features but the prompts hold "
                    f"{int(first.sum())} placeholders.",
                    advice="Pass the processor's input_ids and pixel inputs together.",
                )
            base = base.masked_scatter(first[..., None], features)
            embeds = base.repeat_interleave(source.copies, dim=0)
        return BranchPrompt(embeds, source.layout.real, None)

    def _features(self, source: Source) -> Float[Tensor, "n D"]:
        anatomy, vision = source.anatomy, dict(source.vision)
        if "pixel_values_videos" in vision:
            raise LayoutError(
                "The noised-image branch works on pictures, and this prompt holds a video.",
                advice="Pass the frames as images, or leave the method out.",
            )
        missing = [name for name in anatomy.family.pixels if name not in vision]
        if missing:
            raise LayoutError(
                f"The noised-image branch needs {missing[0]}, which was not passed.",
                advice="Pass the processor's output to generate() as it is.",
            )
        for name in anatomy.family.pixels:
            vision[name] = self._noise(anatomy, vision[name], vision.get("image_grid_thw"))
        output = anatomy.composite.get_image_features(**vision, return_dict=True).pooler_output
        return output.flatten(0, 1) if isinstance(output, Tensor) else torch.cat(list(output))

    def _noise(self, anatomy: Anatomy, pixels: Tensor, grid: Tensor | None) -> Tensor:
        if anatomy.family.frames_in_patch and grid is not None:
            config = anatomy.config.vision_config
            frames, side = config.temporal_patch_size, config.patch_size
            counts = grid.prod(-1).tolist()
            eps = torch.cat([self._draw((n, pixels.shape[1] // frames)) for n in counts])
            eps = eps.unflatten(1, (-1, 1, side, side)).expand(-1, -1, frames, -1, -1).flatten(1)
        elif pixels.ndim == 5:  # [images, tiles, C, H, W]; tiles are padded to the batch's most
            eps = torch.stack([self._draw(pixels.shape[2:], i) for i in range(pixels.shape[1])])
        else:  # [images or tiles, C, H, W]
            eps = self._draw(pixels.shape[1:])
        eps = eps.to(pixels.device)
        noised = self.kept**0.5 * pixels.float() + (1 - self.kept) ** 0.5 * eps
        return noised.to(pixels.dtype)

    def _draw(self, shape: Iterable[int], stream: int = 0) -> Tensor:
        # On the CPU, so that every device gets the same noise.
        generator = torch.Generator().manual_seed(self.seed * 1009 + stream)
        return torch.randn(tuple(shape), generator=generator)
