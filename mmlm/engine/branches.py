"""Auxiliary prompts beside the main one: another image or none, no question, another instruction.

A :class:`Branch` says *what* the auxiliary prompt is and is a frozen value: equal branches of
several methods are one. How branches are run is :mod:`mmlm.engine.auxiliary`'s business.

Every branch is built from the main prompt's own tokens, so its chat template stays as it was.
Branches with the true image take its features from the main pass; those with another image run the
vision tower once per prompt, however many of them share that image.
"""

from __future__ import annotations

import abc
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mmlm.engine.blanks import without_blanks
from mmlm.engine.pixels import by_picture, draw_diffusion_noise, draw_uniform_noise, put_back
from mmlm.engine.template import Template
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.layout import TokenLayout

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


#: Inputs that the positions of a prompt with videos depend on.
_VIDEO_POSITIONS = ("video_grid_thw", "second_per_grid_ts")


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
        types: ``token_type_ids`` [B, N] of the main prompt, if its mask depends on them.
        memo: What branches of this prompt share, e.g. the features of one noised image.
    """

    anatomy: Anatomy
    layout: TokenLayout
    input_ids: Tensor | None
    inputs_embeds: Tensor | None
    vision: Mapping[str, Any]
    copies: int
    features: Tensor | None = None
    processor: Any = None
    types: Tensor | None = None
    memo: dict[Any, Any] = field(default_factory=dict)

    def embeds(self) -> Float[Tensor, "B N D"]:
        """Embeddings of all positions, placeholders included."""
        if self.inputs_embeds is not None:
            return self.inputs_embeds
        embed = self.anatomy.composite.get_input_embeddings()
        ids = self.ids()
        # Some families' placeholders lie behind the table; what stands there does not matter.
        return embed(ids.masked_fill(ids >= embed.num_embeddings, 0))

    def once(self, key: Any, make: Callable[[], Any]) -> Any:
        """The value of ``make()``, made at most once per prompt and key."""
        if key not in self.memo:
            self.memo[key] = make()
        return self.memo[key]

    def ids(self) -> Tensor:
        """Token ids [B, N].

        Raises:
            LayoutError: If the prompt came as embeddings.
        """
        if self.input_ids is None:
            raise LayoutError(
                "The prompt came as inputs_embeds, and a method needs to read its text.",
                advice="Pass input_ids.",
            )
        return self.input_ids

    def readable(self) -> Tensor:
        """Bool [B, N]: positions that hold text."""
        layout = self.layout
        return layout.real & ~layout.visual & ~layout.frame

    def words(self) -> Tensor:
        """Bool [B, N]: positions that hold the user's words.

        Raises:
            LayoutError: If no processor is known, the prompt came as embeddings, or it does not
                follow the processor's chat template.
        """

        def read() -> Tensor:
            template = Template.of(self.processor)
            one = slice(None, None, self.copies)
            words = template.words(self.ids()[one], self.readable()[one])
            return words.repeat_interleave(self.copies, dim=0)

        return self.once("words", read)


@dataclass(frozen=True, eq=False)
class BranchPrompt:
    """An auxiliary prompt, ready to run.

    Attributes:
        embeds: [B, n, D], padded on the left. In families that add visual features to the outputs
            of their first k layers too, [B, n, (1 + k) * D]: those features stand behind, zero on
            text. A prompt without images may leave them out.
        mask: bool [B, n], True on positions that may be attended to.
        positions: [B, n] or, in families with several position axes, [3, B, n]; or None for "the
            main prompt's own" (then n = N).
        types: ``token_type_ids`` [B, n] where the main prompt has them.
        ids: Token ids [B, n] of a prompt without images, if they are known.
        origin: int64 [B, n], each column's position in the main prompt, -1 on padding and on words
            that were added; None if the columns are the main prompt's (then n = N).
    """

    embeds: Tensor
    mask: Tensor
    positions: Tensor | None
    types: Tensor | None = None
    ids: Tensor | None = None
    origin: Tensor | None = None


class Branch(abc.ABC):
    """What an auxiliary prompt is. Subclasses are frozen dataclasses."""

    @property
    def base(self) -> Branch | Literal["main"] | None:
        """The prompt whose beginning this one repeats, token by token, image and all."""
        return None

    @abc.abstractmethod
    def build(self, source: Source) -> BranchPrompt:
        """Makes the auxiliary prompt from the main one."""


@dataclass(frozen=True, eq=False)
class Columns:
    """An auxiliary prompt that is still aligned with the main one, column by column.

    Attributes:
        embeds: [B, N, D].
        keep: bool [B, N], columns that are part of the prompt.
        seen: bool [B, N], columns that may be attended to.
        whole: Whether all real columns are kept.
        ids: int64 [B, N], if they are not the main prompt's.
    """

    embeds: Tensor
    keep: Tensor
    seen: Tensor
    whole: bool
    ids: Tensor | None = None


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
        embeds = source.once(self, lambda: _merged(source, self._features(source)))
        return Columns(embeds, source.layout.real, source.layout.real, whole=True)

    def _features(self, source: Source) -> Float[Tensor, "n D"] | None:
        if not bool(source.layout.visual.any()):
            return None
        anatomy, vision = source.anatomy, _pictures(source, "changed-image")
        for name in anatomy.family.pixels:
            vision[name] = self.repaint(anatomy, vision[name], vision.get("image_grid_thw"))
        return _encode(anatomy, vision)


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
        columns = _true_image(source) if self.image is None else self.image.columns(source)
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
        embeds = _true_image(source).embeds
        added_embeds = functional.pad(added_embeds, (0, embeds.shape[-1] - added_embeds.shape[-1]))
        embeds = torch.cat([embeds, added_embeds.expand(embeds.shape[0], -1, -1)], dim=1)
        types = source.types
        if types is not None:
            types = functional.pad(types, (0, len(extra))).gather(1, index)
        positions = _positions(source, wide.gather(1, index), mask)
        origin = index.masked_fill(~mask | (index >= n), -1)
        return BranchPrompt(_pick(embeds, index, mask), mask, positions, types, origin=origin)


def close_up(source: Source, columns: Columns) -> BranchPrompt:
    """Removes the columns that are not kept and pads on the left.

    Raises:
        LayoutError: If nothing remains of a prompt.
    """
    if columns.whole:
        return BranchPrompt(columns.embeds, columns.seen, None, source.types)
    keep = columns.keep
    longest = int(keep.sum(-1).max())
    if longest == 0 or not bool(keep.any(-1).all()):
        raise LayoutError(
            "A prompt holds nothing but images, so there is no prompt without its image.",
            advice="Ask a question with the image.",
        )
    # A stable sort moves the dropped positions to the front: padding on the left.
    index = keep.long().argsort(dim=1, stable=True)[:, -longest:]
    real = keep.gather(1, index)
    ids = columns.ids if columns.ids is not None else source.input_ids
    ids = None if ids is None else ids.gather(1, index)
    seen = columns.seen.gather(1, index) & real
    types = None if source.types is None else source.types.gather(1, index)
    positions = _positions(source, ids, real)
    return BranchPrompt(
        _pick(columns.embeds, index, real),
        seen,
        positions,
        types,
        ids,
        origin=index.masked_fill(~real, -1),
    )


def _pick(embeds: Tensor, index: Tensor, real: Tensor) -> Tensor:
    picked = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
    return picked * real[..., None].to(embeds.dtype)


def _positions(source: Source, ids: Tensor | None, real: Tensor) -> Tensor:
    """Position ids of a changed prompt, by the model's own rule where images have several axes."""
    plain = (real.long().cumsum(-1) - 1).clamp(min=0) + source.anatomy.family.first_position
    anatomy, vision = source.anatomy, source.vision
    grids = {n: vision[n] for n in ("image_grid_thw", *_VIDEO_POSITIONS) if n in vision}
    if not callable(getattr(anatomy.composite, "get_rope_index", None)) or not grids:
        return plain
    if ids is None:
        raise LayoutError(
            "Positions of a changed prompt need its token ids.", advice="Pass input_ids."
        )
    one = slice(None, None, source.copies)
    kinds = torch.zeros_like(ids)
    for kind, name in ((1, "image_token_id"), (2, "video_token_id")):
        kinds = kinds.masked_fill((ids == getattr(anatomy.config, name, -1)) & real, kind)
    if not bool(kinds.any()):
        return plain
    positions, _ = anatomy.composite.get_rope_index(
        ids[one], mm_token_type_ids=kinds[one], attention_mask=real[one].long(), **grids
    )
    return positions.repeat_interleave(source.copies, dim=1)


def _true_image(source: Source) -> Columns:
    """The main prompt itself; its image features come from the main pass if that has run."""

    def encode() -> Tensor:
        if not bool(source.layout.visual.any()):
            return source.embeds()
        return _merged(source, _encode(source.anatomy, _pictures(source, "true-image")))

    embeds = source.features if source.features is not None else source.once("true image", encode)
    return Columns(embeds, source.layout.real, source.layout.real, whole=True)


def _pictures(source: Source, branch: str) -> dict[str, Any]:
    """The prompt's pixel inputs."""
    vision = {k: v for k, v in source.vision.items() if k not in _VIDEO_POSITIONS}
    if "pixel_values_videos" in vision:
        raise LayoutError(
            f"The {branch} branch works on pictures, and this prompt holds a video.",
            advice="Pass the frames as images, or leave the method out.",
        )
    missing = [name for name in source.anatomy.family.pixels if name not in vision]
    if missing:
        raise LayoutError(
            f"The {branch} branch needs {missing[0]}, which was not passed.",
            advice="Pass the processor's output to generate() as it is.",
        )
    return vision


def _encode(anatomy: Anatomy, vision: dict[str, Any]) -> Float[Tensor, "n D"]:
    """Features of all images, one after another, with the deep-stacked ones behind each."""
    output = anatomy.composite.get_image_features(**vision, return_dict=True)
    merged = output.pooler_output
    features = merged.flatten(0, 1) if isinstance(merged, Tensor) else torch.cat(list(merged))
    deep = getattr(output, "deepstack_features", None) or ()
    return torch.cat([features, *(torch.cat(list(level)) for level in deep)], dim=-1)


def _merged(source: Source, features: Float[Tensor, "n D"] | None) -> Float[Tensor, "B N D"]:
    """Embeddings of the prompt with features in the place of its visual placeholders."""
    embeds = source.embeds()
    if features is None:
        return embeds
    first = source.layout.visual[:: source.copies]
    base = embeds[:: source.copies]
    if int(first.sum()) != features.shape[0]:
        raise LayoutError(
            f"The images give {features.shape[0]} features but the prompts hold "
            f"{int(first.sum())} placeholders.",
            advice="Pass the processor's input_ids and pixel inputs together.",
        )
    base = functional.pad(base, (0, features.shape[-1] - base.shape[-1]))
    base = base.masked_scatter(first[..., None], features.to(base.dtype))
    return base.repeat_interleave(source.copies, dim=0)


def _mean(anatomy: Anatomy, picture: Tensor) -> Tensor:
    """One picture in its own mean colour; patches [n, C * frames * p * p] or tiles [t, C, H, W]."""
    if picture.ndim == 2:
        channels = picture.unflatten(1, (3, -1))
        return channels.mean((0, 2), keepdim=True).expand_as(channels).flatten(1)
    return picture.mean((0, 2, 3), keepdim=True).expand_as(picture)
