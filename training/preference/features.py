"""Whether a model makes as many features of pictures as its processor writes places for.

A processor and a model from different checkpoints may disagree (`patch_size`,
`num_additional_image_tokens`, a feature layer with or without class token). transformers finds out
in the first forward pass, for a whole batch, and TRL's batch holds every picture twice.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from training.errors import ImageTokenMismatch
from training.preference.rows import PreferenceRow

if TYPE_CHECKING:
    from training.preference.collator import VisionPreferenceCollator

__all__ = ["check_features"]


def check_features(
    model: Any, collator: VisionPreferenceCollator, rows: Sequence[PreferenceRow]
) -> None:
    """Encodes the pictures of some rows and compares their numbers with the rows' tokens.

    One row for every number of pictures that there is: the first one.

    Args:
        model: The model, before DeepSpeed divides its weights.
        collator: Of the training.
        rows: Rows that can be used.

    Raises:
        ImageTokenMismatch: With the row's id and both numbers.
    """
    import torch

    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.branches.prompts import encode

    anatomy = Anatomy(model)
    image_ids = torch.tensor(anatomy.image_ids)
    first = {len(row.images): row for row in reversed(rows) if row.images}
    for row in first.values():
        batch = collator([row])
        places = int(torch.isin(batch["input_ids"][:1], image_ids).sum())
        text = {name for name in batch if name.endswith(("_ids", "_mask"))}
        text -= {"pixel_attention_mask"}
        vision = {
            name: _first_half(value, model) for name, value in batch.items() if name not in text
        }
        with torch.no_grad():
            features = len(encode(anatomy, vision))
        if features != places:
            raise ImageTokenMismatch(
                f"row {row.id!r} has {places} image tokens, and the model makes {features} "
                f"features of its {len(row.images)} pictures.",
                advice="Take processor and model from the same checkpoint; in LLaVA's the "
                "processor's patch_size, num_additional_image_tokens and "
                "vision_feature_select_strategy must be those of the model's configuration.",
            )


def _first_half(value: Any, model: Any) -> Any:
    """The pictures of the chosen answers, which are those of the rejected ones too."""
    half = value[: len(value) // 2]
    if not hasattr(half, "to"):
        return half
    half = half.to(model.device)
    return half.to(model.dtype) if half.is_floating_point() else half
