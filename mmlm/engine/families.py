"""How model families differ: one row each. The only file that knows them.

A model type without a row gets :data:`GENERIC`; where a row's names are looked up stands in
:mod:`mmlm.engine.anatomy`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from mmlm.engine.layout import Framing

__all__ = ["FAMILIES", "GENERIC", "Family"]


@dataclass(frozen=True)
class Family:
    """How one model family deviates from the generic row.

    Attributes:
        image_ids: Names of configuration entries that hold ids of visual placeholder tokens.
        wrapper_ids: Names of configuration entries of tokens that only frame an image.
        framing: How frame tokens are told whose ids are in no configuration, see
            :data:`mmlm.engine.layout.Framing`.
        blank: Text that the processor puts before and after each framed image. Tokenizers melt it
            into the text around, so only a processor can take it out of a prompt again.
        sizes: How images are told apart that stand side by side without a token between them.
            ``"runs"``: the family never writes them so. ``"equal"``: all take equally many
            positions. ``"packed"``: tiles and line ends are packed by each picture's size.
        first_position: Position id of the first token.
        types: Whether ``token_type_ids`` shape the attention mask, so that an auxiliary prompt
            needs them too.
        tower: Paths of the vision tower below the inner model, tried in order.
        projector: Paths of the projector below the inner model, tried in order.
        pixels: Names of pixel inputs that the "noised image" branch disturbs.
        frames_in_patch: Pixel rows are flattened patches holding this configured number of equal
            copies of a still picture (``temporal_patch_size``); noise must be equal in all copies.
        remembered: Attributes in which the inner model keeps run state of its own; an auxiliary
            pass must leave them as they were.
        softcap: Whether the model bounds its logits by ``final_logit_softcapping``, if its text
            configuration has a number there.
        prefix: Whether the whole prompt is read both ways, so that nothing is left to be opened.
        projects_each: Whether the projector maps each image feature by itself, so that it need
            not run on those that are not wanted.
        pools: How a pooled grid gets through a projector that does not. ``"shuffled"``: it merges
            squares of any square grid. ``"averaged"``: it takes the whole grid and averages
            squares of it. ``"after"``: features are pooled behind it.
    """

    image_ids: tuple[str, ...] = ("image_token_id", "image_token_index", "video_token_id")
    wrapper_ids: tuple[str, ...] = ()
    framing: Framing = "ids"
    blank: str = ""
    sizes: Literal["runs", "equal", "packed"] = "runs"
    first_position: int = 0
    types: bool = False
    tower: tuple[str, ...] = ("vision_tower", "visual", "vision_model")
    projector: tuple[str, ...] = ("multi_modal_projector", "visual.merger", "connector")
    pixels: tuple[str, ...] = ("pixel_values",)
    frames_in_patch: bool = False
    remembered: tuple[str, ...] = ()
    softcap: bool = False
    prefix: bool = False
    projects_each: bool = False
    pools: Literal["after", "shuffled", "averaged"] = "after"


#: For model types without a row: the names that vision-language models in transformers use.
GENERIC = Family(
    image_ids=(
        "image_token_id",
        "image_token_index",
        "image_patch_id",
        "img_context_token_id",
        "video_token_id",
    ),
    wrapper_ids=(
        "vision_start_token_id",
        "vision_end_token_id",
        "image_start_token_id",
        "image_end_token_id",
        "boi_token_id",
        "boi_token_index",
        "eoi_token_id",
        "eoi_token_index",
    ),
    tower=(
        "vision_tower",
        "visual",
        "vision_model",
        "vision_encoder",
        "image_tower",
        "vision_backbone",
        "image_encoder",
    ),
    projector=(
        "multi_modal_projector",
        "visual.merger",
        "connector",
        "aligner",
        "mm_projector",
        "vision_projection",
        "projector",
    ),
)
FAMILIES: dict[str, Family] = {
    "llava": Family(sizes="equal", projects_each=True),
    "llava_next": Family(sizes="packed", projects_each=True),
    "llava_onevision": Family(sizes="packed", projects_each=True),
    "qwen2_5_vl": Family(
        wrapper_ids=("vision_start_token_id", "vision_end_token_id"),
        frames_in_patch=True,
        remembered=("rope_deltas",),
    ),
    "qwen3_vl": Family(
        wrapper_ids=("vision_start_token_id", "vision_end_token_id"),
        frames_in_patch=True,
        remembered=("rope_deltas",),
    ),
    "internvl": Family(framing="neighbours", projects_each=True),
    "idefics3": Family(framing="tiles", pools="shuffled"),
    "smolvlm": Family(framing="tiles", pools="shuffled"),
    "paligemma": Family(
        sizes="equal",
        first_position=1,
        types=True,
        softcap=True,
        prefix=True,
        projects_each=True,
    ),
    "gemma3": Family(
        wrapper_ids=("boi_token_id", "boi_token_index", "eoi_token_id", "eoi_token_index"),
        blank="\n\n",
        types=True,
        pools="averaged",
    ),
}
