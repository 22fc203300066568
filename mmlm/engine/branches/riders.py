"""Auxiliary prompts that ride in the main prefill, as rows below the main ones."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional

from mmlm.errors import LayoutError

if TYPE_CHECKING:
    from mmlm.engine.session import Session

__all__ = ["with_riders"]


def with_riders(session: Session, inputs: dict[str, Any]) -> dict[str, Any]:
    """A prompt's inputs with the riders' rows below the main ones, padded on the left.

    Raises:
        LayoutError: If the prompt has no ids, or a riding prompt is not text.
    """
    source = session.source
    if source is None or source.input_ids is None:
        raise LayoutError("Riding branches need input_ids.", advice="Pass token ids.")
    layout, changed = session.full_layout, dict(inputs)
    positions = session.main_positions(inputs)
    prompts = [branch.build(source) for branch in session.riders]
    # Rows below the main ones hold text only; their embeddings equal those of their ids.
    ids, masks, places = [source.input_ids], [layout.real], [positions]
    for prompt in prompts:
        if prompt.ids is None:
            raise LayoutError("A riding branch must be text.", advice="Use NoImage().")
        short = layout.length - prompt.embeds.shape[1]
        own = functional.pad(prompt.mask, (short, 0))
        ids.append(torch.where(own, functional.pad(prompt.ids, (short, 0)), prompt.ids[:, -1:]))
        masks.append(own)
        place = functional.pad(prompt.positions, (short, 0))  # type: ignore[arg-type]
        three = positions.ndim == 3
        places.append(place.expand(positions.shape[0], -1, -1) if three else place)
    changed["input_ids"] = torch.cat(ids)
    changed["attention_mask"] = torch.cat(masks).long()
    changed["position_ids"] = torch.cat(places, dim=-2)
    changed.pop("mm_token_type_ids", None)
    if source.types is not None:
        changed["token_type_ids"] = functional.pad(
            source.types, (0, 0, 0, len(session.riders) * layout.rows)
        )
    session.riding = len(session.riders) * layout.rows
    session.riding_real = torch.cat(masks[1:])
    return changed
