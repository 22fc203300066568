"""What probes of decoder layers share: which layers, what a record must agree with, its numbers."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Self

from mmlm.engine.anatomy import Anatomy
from mmlm.engine.method import Method
from mmlm.engine.selections import check_layers, read_numbers
from mmlm.errors import HiddenAttention

__all__ = ["LayerProbe", "check_rows", "check_shown", "short"]


@dataclass(frozen=True, kw_only=True)
class LayerProbe(Method):
    """A probe of some decoder layers, of all of them unless it says otherwise."""

    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None:
            chosen = read_numbers(type(self).__name__, "layers", self.layers)
            object.__setattr__(self, "layers", chosen)

    def neutral(self) -> Self:
        """Itself: the model is unchanged under every setting."""
        return self

    def layers_of(self, anatomy: Anatomy) -> tuple[int, ...]:
        """The layers that are measured on a model."""
        return tuple(range(anatomy.n_layers)) if self.layers is None else self.layers

    def acts_in(self, anatomy: Anatomy, layer: int) -> bool:
        """The chosen layers."""
        return layer in self.layers_of(anatomy)

    def unsupported(self, anatomy: Anatomy) -> list[str]:
        """Runs wherever the sites can be seen."""
        check_layers(type(self).__name__, self.layers_of(anatomy), anatomy.n_layers)
        return []


def check_rows(tokens: Sequence[int] | None, rows: int) -> None:
    """Raises ValueError if lengths of answers are not one number per row."""
    if tokens is not None and len(tokens) != rows:
        raise ValueError(f"Got {len(tokens)} numbers of tokens for {rows} rows.")


def check_shown(layers: Sequence[int], shown: Collection[int]) -> None:
    """Raises HiddenAttention if the attention of a layer was never shown.

    Args:
        layers: Those that are measured.
        shown: Those whose rows came.
    """
    if silent := [layer for layer in layers if layer not in shown]:
        raise HiddenAttention(
            f"Layer {silent[0]} does not hand its queries and keys to the library's attention "
            "interface, so its attention cannot be seen.",
            advice="Measure other layers (`layers=...`), or another model.",
        )


def short(x: Any, digits: int = 9) -> Any:
    """A number, or nested lists of numbers, with as many digits as fp32 is good for."""
    if isinstance(x, list):
        return [short(part, digits) for part in x]
    return float(f"{x:.{digits}g}")
