"""Attention of a prompt's last position on each image, in every layer: a probe for tools."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from mmlm.engine.method import Method, Paper, Prompt, Rows
from mmlm.probes.image_attention import ImageAttention, image_marks, key_sums


@dataclass
class _State:
    """Marks of the images [B, N, I], and the shares of each layer [B, I]."""

    marks: Tensor
    layers: dict[int, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class LastRow(Method):
    """Looks at one row of each layer's attention, behind the edits of all other methods."""

    paper: ClassVar[Paper] = ImageAttention.paper
    only_looks: ClassVar[frozenset[str]] = frozenset({"weights"})
    measures: ClassVar[str] = "last_row"

    def neutral(self) -> LastRow:
        """Itself: nothing is changed."""
        return self

    @property
    def rows(self) -> Rows:
        """The last one."""
        return "last"

    def begin(self, prompt: Prompt) -> _State:
        """Notes which position belongs to which image."""
        return _State(image_marks(prompt.layout))

    def weights(self, state: _State, layer: int, rows: Tensor, a: Tensor) -> None:
        """Adds a layer's row up by image; the mean over heads."""
        n = state.marks.shape[1]
        if a.shape[-1] == n:  # the prompt itself, no token after it
            seen = key_sums(a[:, :, -1:], None, n)
            state.layers[layer] = (seen[:, None] @ state.marks)[:, 0]

    def record(self, state: _State, tokens: Sequence[int] | None) -> list[dict[str, Any]]:
        """For each row: attention on each image, layer by layer."""
        shares = [state.layers[layer].tolist() for layer in sorted(state.layers)]
        return [{"layers": list(row)} for row in zip(*shares, strict=True)]


def shares(records: Sequence[dict[str, Any]]) -> dict[str, list[float]]:
    """Means over rows, of layer 0 and over all layers, by image.

    Args:
        records: What `mmlm.measured` gave for each row.
    """
    import numpy as np

    found = np.array([one[LastRow.measures]["layers"] for one in records])  # [rows, layers, I]
    mean = found.mean(0)
    return {"layer_0": mean[0].tolist(), "all_layers": mean.mean(0).tolist()}
