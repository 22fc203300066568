"""Early, middle and late layers of a decoder. Imports nothing, so that scorers can use it."""

from __future__ import annotations

__all__ = ["STAGES", "measured_layers", "stage_layers"]

#: In the order in which a forward pass meets them.
STAGES = ("early", "middle", "late")


def stage_layers(n_layers: int) -> dict[str, tuple[int, ...]]:
    """The two layers of each stage: the first two, the two central ones, the last two.

    Stages of a decoder of fewer than six layers overlap, and one of a single layer has one each.

    Args:
        n_layers: Decoder layers, >= 1.
    """
    middle = n_layers // 2
    pairs = ((0, 1), (middle - 1, middle), (n_layers - 2, n_layers - 1))
    return {
        stage: tuple(layer for layer in pair if 0 <= layer < n_layers)
        for stage, pair in zip(STAGES, pairs, strict=True)
    }


def measured_layers(n_layers: int) -> tuple[int, ...]:
    """All layers of the three stages, sorted, each once."""
    return tuple(sorted({layer for pair in stage_layers(n_layers).values() for layer in pair}))
