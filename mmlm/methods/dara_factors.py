"""The numbers that DARA learns."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Factors", "said"]

#: Names under which the factors are stored.
_NAMES = {"score": "offsets", "weight": "logarithms"}


class Factors(nn.Module):
    """The factors of the chosen layers, in fp32 whatever the model's precision.

    What learns is theta [H, S] of each layer, 0 at the identity: F = 1 + theta ("score") or
    F = exp(theta) ("weight"). So weight decay pulls towards the unchanged model; decay of F itself
    would silence the images.

    Args:
        layers: The chosen layers.
        heads: Query heads H.
        images: Slots S.
        mode: "score" or "weight".
        init: The value that all factors have at first.
    """

    keep_fp32 = True

    def __init__(
        self, layers: tuple[int, ...], heads: int, images: int, mode: str, init: float = 1.0
    ) -> None:
        super().__init__()
        self.mode = mode
        start = init - 1 if mode == "score" else math.log(init)
        theta = {str(n): nn.Parameter(torch.full((heads, images), start)) for n in layers}
        # By another name in either mode: weights of one mean nothing in the other.
        setattr(self, _NAMES[mode], nn.ParameterDict(theta))

    @property
    def theta(self) -> dict[int, Tensor]:
        """By layer: [H, S]."""
        return {int(n): x for n, x in getattr(self, _NAMES[self.mode]).items()}

    def forward(self) -> Tensor:
        """What acts on scores, [layers, H, S]: F as a factor, or log F as a summand ("weight").

        Read through here, not as an attribute: sharded weights (ZeRO-3) are there in here only.
        """
        theta = torch.stack(list(self.theta.values()))
        return 1 + theta if self.mode == "score" else theta

    def factors(self) -> Tensor:
        """F [layers, H, S]."""
        acting: Tensor = self()
        return acting if self.mode == "score" else acting.exp()

    @torch.no_grad()
    def set_factors(self, values: Tensor | list[Any]) -> None:
        """Writes F.

        Args:
            values: [layers, H, S], or what broadcasts to it.

        Raises:
            ValueError: If the shape does not fit or a factor is not allowed in this mode.
        """
        own = self.theta.values()
        shape = torch.Size([len(own), *next(iter(own)).shape])
        given = torch.as_tensor(values, dtype=torch.float32)
        try:
            whole = given.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"DARA: factors must be [layers, heads, images] = {list(shape)}, got "
                f"{list(given.shape)}."
            ) from None
        self.refuse(whole)
        for theta, layer in zip(own, whole, strict=True):
            theta.copy_(layer - 1 if self.mode == "score" else layer.log())

    def refuse(self, factors: Tensor) -> None:
        """Refuses factors with which attention means nothing.

        Raises:
            ValueError: If one is not finite, or not positive in mode "weight".
        """
        wrong = ~factors.isfinite()
        allowed = "finite"
        if self.mode == "weight":
            wrong, allowed = wrong | (factors <= 0), "finite and > 0 (mode 'weight')"
        if bool(wrong.any()):
            place = wrong.nonzero()[0].tolist()
            raise ValueError(
                f"DARA: factors must be {allowed}, got {float(factors[tuple(place)])} at "
                f"(layer, head, image) = {tuple(place)}; {int(wrong.sum())} are so."
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Factors:
        """Moves with the model, but not into another precision."""

        def moved(x: Tensor) -> Tensor:
            new = fn(x)
            return new if new.dtype == x.dtype else x.to(new.device)

        return super()._apply(moved, recurse)


def said(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Stored factors in words: mode, layers, heads, images."""
    modes = {name: mode for mode, name in _NAMES.items()}
    parts = [
        f"{modes.get(name.partition('.')[0], name)!r} factors of layer {name.partition('.')[2]}, "
        + (f"{x[0]} heads x {x[1]} images" if len(x) == 2 else f"shape {tuple(x)}")
        for name, x in sorted(shapes.items())
    ]
    return "; ".join(parts) or "nothing"
