"""Maps of attention heads as figures: of what a probe measured, and of a file of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmlm.show import figures

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from mmlm.engine.head_maps import HeadMap

__all__ = ["MAPS", "draw_map", "draw_records"]

MAPS = {
    "head_divergence": ("relative", "relative head divergence"),
    "visual_heads": ("looks", "share of tokens"),
    "retrieval_heads": ("copies", "share of tokens"),
    "query_norms": ("shares", "share within the layer"),
    "attention_sinks": ("map", "mean attention on the first token"),
}
"""By measurement: which number of a record is one per layer and head, and what it is."""


def draw_records(records: Mapping[str, Mapping[str, Any] | None], measures: str) -> Figure | None:
    """What a probe measured of every head, a map per answer, side by side with one scale.

        draw_records({"plain": mmlm.measured(model)[0]["attention_sinks"]}, "attention_sinks")

    Args:
        records: By the name of the answer; None where it was not measured.
        measures: The measurement, one of :data:`MAPS`.

    Returns:
        None if no record has the number.
    """
    import numpy as np

    field, label = MAPS[measures]
    found = {name: r for name, r in records.items() if r is not None and r.get(field)}
    if not found:
        return None
    maps = {name: np.asarray(record[field]) for name, record in found.items()}
    return figures.heads(maps, next(iter(found.values()))["layers"], label)


def draw_map(found: HeadMap, value: str = "") -> Figure:
    """All heads of a map, not only the strongest ones.

    Args:
        found: The map.
        value: Which of its values. Default: the one by which heads are ranked.
    """
    name = value or found.rank
    values = found.values[name].nan_to_num(0.0).clamp(min=0).numpy()
    return figures.heads({f"{found.kind} heads": values}, range(found.shape[0]), name)
