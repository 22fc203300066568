"""Auxiliary prompts beside the main one: another image or none, no question, another instruction.

A :class:`Branch` says *what* the auxiliary prompt is and is a frozen value: equal branches of
several methods are one. How branches are run is :mod:`mmlm.engine.branches.auxiliary`'s business.

Every branch is built from the main prompt's own tokens, so its chat template stays as it was.
Branches with the true image take its features from the main pass; those with another image run the
vision tower once per prompt, however many of them share that image.
"""

from __future__ import annotations

import abc
import functools
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mmlm.engine.branches.blanks import without_blanks
from mmlm.engine.branches.prompts import (
    BranchPrompt,
    Captured,
    Columns,
    Source,
    close_up,
    encode,
    merged,
    pick,
    pictures_of,
    positions_of,
    true_image,
)
from mmlm.engine.branches.template import Template
from mmlm.engine.vision.pixels import by_picture, draw_diffusion_noise, draw_uniform_noise, put_back

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy

__all__ = [
    "Branch",
    "BranchPrompt",
    "Captured",
    "Flat",
    "ImageBranch",
    "Instruction",
    "NoImage",
    "NoText",
    "Noised",
    "Same",
    "Source",
    "UniformNoise",
]


class Branch(abc.ABC):
    """What an auxiliary prompt is. Subclasses are frozen dataclasses."""

    @property
    def base(self) -> Branch | Literal["main"] | None:
        """The prompt whose beginning this one repeats, token by token, image and all."""
        return None

    @abc.abstractmethod
    def build(self, source: Source) -> BranchPrompt:
        """Makes the auxiliary prompt from the main one."""


class ImageBranch(Branch):
    """The same text with another image, or none."""

    @abc.abstractmethod
    def columns(self, source: Source) -> Columns:
        """The auxiliary prompt, before what is left out is closed up."""

    def build(self, source: Source) -> BranchPrompt:
        """Makes the auxiliary prompt from the main one."""
        return close_up(source, self.columns(source))


@dataclass(frozen=True)
class Same(Branch):
    """The main prompt with its images, run through the model without any method.

    ``prompt.run`` gives it the main pass's own arguments, so it is exact in every family and no
    picture is encoded a second time.
    """

    def build(self, source: Source) -> BranchPrompt:
        """The main prompt's merged embeddings."""
        embeds = source.features if source.features is not None else source.embeds()
        return BranchPrompt(embeds, source.layout.real, None, source.types)


@dataclass(frozen=True)
class NoImage(ImageBranch):
    """The same prompt without its images.

    Built on the token level, so that the chat template stays. Asking a chat template for a prompt
    without image is not the same: some templates change, and some adapters skip it altogether.
    Blank lines that a processor writes around images go too, if the processor is known.

    Attributes:
        kind: "drop": visual tokens and the tokens that frame them are deleted and the remaining
            positions closed up. "columns": the same tokens at the same positions, but nothing may
            attend to the visual ones.
    """

    kind: Literal["drop", "columns"] = "drop"

    def columns(self, source: Source) -> Columns:
        """Leaves the images out, row by row."""
        layout = source.layout
        if self.kind == "columns":
            seen = layout.real & ~layout.visual
            return Columns(source.embeds(), layout.real, seen, whole=True)
        keep = source.readable()
        blank = source.anatomy.family.blank
        if not blank or source.processor is None or source.input_ids is None:
            return Columns(source.embeds(), keep, keep, whole=False)

        def shorten() -> tuple[Tensor, Tensor]:
            tokenizer = getattr(source.processor, "tokenizer", source.processor)
            return without_blanks(source.ids(), layout, blank, tokenizer)

        ids, gone = source.once("blanks", shorten)
        embeds = replace(source, input_ids=ids, inputs_embeds=None).embeds()
        return Columns(embeds, keep & ~gone, keep & ~gone, whole=False, ids=ids)


class _Repainted(ImageBranch):
    """The same prompt with its images' pixels changed and encoded anew."""

    @abc.abstractmethod
    def repaint(self, anatomy: Anatomy, pixels: Tensor, grid: Tensor | None) -> Tensor:
        """New pixels of the same shape."""

    def columns(self, source: Source) -> Columns:
        """Runs the tower on the new pixels, once per prompt, and puts their features in place."""
        embeds = source.once(self, lambda: merged(source, self._features(source)))
        return Columns(embeds, source.layout.real, source.layout.real, whole=True)

    def _features(self, source: Source) -> Float[Tensor, "n D"] | None:
        if not bool(source.layout.visual.any()):
            return None
        anatomy, vision = source.anatomy, pictures_of(source, "changed-image")
        for name in anatomy.family.pixels:
            vision[name] = self.repaint(anatomy, vision[name], vision.get("image_grid_thw"))
        return encode(anatomy, vision)


@dataclass(frozen=True)
class Noised(_Repainted):
    """The same prompt with a diffusion-noised image: ``sqrt(abar) v + sqrt(1 - abar) eps``.

    ``eps`` is drawn from a generator seeded anew for every image, so that a row's result does not
    depend on its batch. Every image of one size gets the same ``eps``.

    Attributes:
        kept: ``abar``, the share of the signal's variance that is kept, in [0, 1].
        seed: Seed of ``eps``.
    """

    kept: float
    seed: int

    def repaint(self, anatomy: Anatomy, pixels: Tensor, grid: Tensor | None) -> Tensor:
        """Adds the noise."""
        eps = draw_diffusion_noise(anatomy, pixels, grid, self.seed)
        noised = self.kept**0.5 * pixels.float() + (1 - self.kept) ** 0.5 * eps
        return noised.to(pixels.dtype)


@dataclass(frozen=True)
class UniformNoise(_Repainted):
    """The same prompt with uniform noise in [0, 1) for pixels, after their normalisation.

    The noise of an image is drawn from a generator seeded with ``seed`` and a hash of the image's
    own pixels: different images get different noise, and a row does not depend on its batch.

    Attributes:
        seed: Seed of the noise.
    """

    seed: int = 0

    def repaint(self, anatomy: Anatomy, pixels: Tensor, grid: Tensor | None) -> Tensor:
        """Draws the noise."""
        noise = functools.partial(draw_uniform_noise, anatomy, seed=self.seed)
        return put_back(pixels, grid, [noise(p) for p in by_picture(pixels, grid)])


@dataclass(frozen=True)
class Flat(_Repainted):
    """The same prompt with one colour for an image.

    Attributes:
        colour: "zeros": zero after the normalisation, i.e. the mean colour of the processor's
            training images. "mean": the image's own mean.
    """

    colour: Literal["zeros", "mean"] = "zeros"

    def repaint(self, anatomy: Anatomy, pixels: Tensor, grid: Tensor | None) -> Tensor:
        """Paints each image in its colour."""
        if self.colour == "zeros":
            black = torch.zeros_like(pixels)
            # Some families take a tile of zeros for padding: as near to it as numbers go.
            return black + (pixels != 0) * torch.finfo(pixels.dtype).tiny
        return put_back(pixels, grid, [_mean(anatomy, p) for p in by_picture(pixels, grid)])


@dataclass(frozen=True)
class NoText(Branch):
    """The same prompt without the user's words: the chat template and the images stay.

    Attributes:
        image: What becomes of the image; None leaves it as it is.
    """

    image: ImageBranch | None = None
    needs_template: ClassVar[bool] = True

    @property
    def base(self) -> Branch | Literal["main"]:
        """The prompt with the words in it."""
        return "main" if self.image is None else self.image

    def build(self, source: Source) -> BranchPrompt:
        """Leaves the user's words of all turns out and closes the remaining positions up."""
        columns = true_image(source) if self.image is None else self.image.columns(source)
        rest = ~source.words()
        return close_up(
            source,
            replace(columns, keep=columns.keep & rest, seen=columns.seen & rest, whole=False),
        )


@dataclass(frozen=True)
class Instruction(Branch):
    """The same image and question under another instruction.

    Attributes:
        prefix: The instruction.
        place: "system": it becomes the system message, in place of the prompt's own or the
            template's default one. "question": it stands before the words of the last question.
            "auto": "system" if the chat template has a system message, else "question".
    """

    prefix: str
    place: Literal["auto", "system", "question"] = "auto"
    needs_template: ClassVar[bool] = True

    @property
    def base(self) -> Literal["main"]:
        """The main prompt, up to the instruction."""
        return "main"

    def build(self, source: Source) -> BranchPrompt:
        """Puts the instruction's tokens into every row."""
        template, one = Template.of(source.processor), slice(None, None, source.copies)
        ids, readable = source.ids()[one], source.readable()[one]
        system = template.has_system if self.place == "auto" else self.place == "system"
        edit = template.system if system else template.question
        real, n = source.layout.real[one], ids.shape[1]
        edits = edit(self.prefix, ids, readable)
        extra = ids.new_tensor(edits[0][2])  # the same words in every row
        orders = []
        for row, (start, stop, new) in enumerate(edits):
            own = torch.arange(n, device=ids.device)[real[row]]
            added = torch.arange(n, n + len(new), device=ids.device)
            orders.append(torch.cat([own[own < start], added, own[own >= stop]]))
        longest = max(len(order) for order in orders)
        index = torch.stack([functional.pad(o, (longest - len(o), 0), value=-1) for o in orders])
        index = index.repeat_interleave(source.copies, dim=0)
        mask = index >= 0
        index = index.clamp(min=0)
        wide = torch.cat([source.ids(), extra.expand(source.layout.rows, -1)], dim=1)
        added_embeds = source.anatomy.composite.get_input_embeddings()(extra)
        embeds = true_image(source).embeds
        added_embeds = functional.pad(added_embeds, (0, embeds.shape[-1] - added_embeds.shape[-1]))
        embeds = torch.cat([embeds, added_embeds.expand(embeds.shape[0], -1, -1)], dim=1)
        types = source.types
        if types is not None:
            types = functional.pad(types, (0, len(extra))).gather(1, index)
        positions = positions_of(source, wide.gather(1, index), mask)
        origin = index.masked_fill(~mask | (index >= n), -1)
        return BranchPrompt(pick(embeds, index, mask), mask, positions, types, origin=origin)


def _mean(anatomy: Anatomy, picture: Tensor) -> Tensor:
    """One picture in its own mean colour; patches [n, C * frames * p * p] or tiles [t, C, H, W]."""
    if picture.ndim == 2:
        channels = picture.unflatten(1, (3, -1))
        return channels.mean((0, 2), keepdim=True).expand_as(channels).flatten(1)
    return picture.mean((0, 2, 3), keepdim=True).expand_as(picture)
