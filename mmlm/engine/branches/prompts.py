"""The main prompt as auxiliary prompts are made from it, and what an auxiliary prompt is made of.

What is done to the prompt is :mod:`mmlm.engine.branches.branch`' business; here are its parts:
tokens, embeddings with image features, positions by the model's own rule, and how gaps are closed
up.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from mmlm.engine.branches.template import Template
from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.layout import TokenLayout

__all__ = [
    "BranchPrompt",
    "Captured",
    "Columns",
    "Source",
    "close_up",
    "encode",
    "merged",
    "pick",
    "pictures_of",
    "positions_of",
    "true_image",
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
    positions = positions_of(source, ids, real)
    return BranchPrompt(
        pick(columns.embeds, index, real),
        seen,
        positions,
        types,
        ids,
        origin=index.masked_fill(~real, -1),
    )


def pick(embeds: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """Embeddings [B, n, D] of some columns [B, n] of each row, zero where they are padding."""
    picked = embeds.gather(1, index[..., None].expand(-1, -1, embeds.shape[-1]))
    return picked * real[..., None].to(embeds.dtype)


def positions_of(source: Source, ids: Tensor | None, real: Tensor) -> Tensor:
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


def true_image(source: Source) -> Columns:
    """The main prompt itself; its image features come from the main pass if that has run."""

    def look() -> Tensor:
        if not bool(source.layout.visual.any()):
            return source.embeds()
        return merged(source, encode(source.anatomy, pictures_of(source, "true-image")))

    embeds = source.features if source.features is not None else source.once("true image", look)
    return Columns(embeds, source.layout.real, source.layout.real, whole=True)


def pictures_of(source: Source, branch: str) -> dict[str, Any]:
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


def encode(anatomy: Anatomy, vision: dict[str, Any]) -> Float[Tensor, "n D"]:
    """Features of all images, one after another, with the deep-stacked ones behind each."""
    output = anatomy.composite.get_image_features(**vision, return_dict=True)
    merged = output.pooler_output
    features = merged.flatten(0, 1) if isinstance(merged, Tensor) else torch.cat(list(merged))
    deep = getattr(output, "deepstack_features", None) or ()
    return torch.cat([features, *(torch.cat(list(level)) for level in deep)], dim=-1)


def merged(source: Source, features: Float[Tensor, "n D"] | None) -> Float[Tensor, "B N D"]:
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
