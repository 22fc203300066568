"""What decides when visual tokens leave: a small network per layer, and the text that it reads.

Shared by :class:`mmlm.methods.dyvte.DyVTE`, which asks the routers, and by their training, which
asks them about prompts that are followed by an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["AFTER_IMAGE", "ALL_TEXT", "BETWEEN", "NO_TEXT", "RULES", "Pooling", "Router", "Routers"]

#: Which text of a row is read: that after its last visual position; where there is none, that after
#: the first one; where there is none either, all of it. Rows of nothing but images are not asked.
NO_TEXT, AFTER_IMAGE, BETWEEN, ALL_TEXT = -1, 0, 1, 2
RULES = {
    NO_TEXT: "no text",
    AFTER_IMAGE: "after the last image",
    BETWEEN: "after the first image",
    ALL_TEXT: "all text",
}


class Router(nn.Module):
    """``z = W2 gelu(W1 [mean ; last])``: logits of (keep, exit), without biases.

    Args:
        width: Width D of the decoder.
        hidden: Width between the two matrices.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(2 * width, hidden, bias=False)
        self.w2 = nn.Linear(hidden, 2, bias=False)
        for matrix in (self.w1, self.w2):
            nn.init.xavier_uniform_(matrix.weight)

    def forward(self, features: Float[Tensor, "B F"]) -> Float[Tensor, "B 2"]:
        """Logits in the precision of the weights."""
        found: Tensor = self.w2(functional.gelu(self.w1(features.to(self.w1.weight.dtype))))
        return found


class Routers(nn.ModuleDict):
    """One router per layer, by the layer's number.

    Args:
        layers: Numbers of the layers after which is asked.
        width: Width D of the decoder.
        hidden: Hidden width of each router.
    """

    def __init__(self, layers: Iterable[int], width: int, hidden: int) -> None:
        super().__init__({str(layer): Router(width, hidden) for layer in layers})
        self.width, self.hidden = width, hidden
        self.held = False

    def at(self, layer: int) -> Router:
        """The router that is asked after a layer."""
        router = self[str(layer)]
        assert isinstance(router, Router)
        return router

    @contextmanager
    def hold(self) -> Iterator[None]:
        """Nobody is asked inside: every position stays."""
        before, self.held = self.held, True
        try:
            yield
        finally:
            self.held = before

    def check(self, shapes: Mapping[str, tuple[int, ...]], who: str, *, every: bool) -> list[str]:
        """Names of this object's tensors in a file that may hold routers of more layers.

        Args:
            shapes: Shapes of the file's tensors.
            who: Name of the method, for the error.
            every: Whether the file must hold these routers and no others.

        Raises:
            ValueError: If the number of routers, the decoder's width or the hidden width differs.
        """
        stored = {int(n.split(".")[0]) for n in shapes if n.split(".")[0].isdigit()}
        own = {int(name) for name in self}
        if (every and stored != own) or own - stored:
            asked = "every layer" if every else f"the layers {', '.join(map(str, sorted(own)))}"
            raise ValueError(
                f"{who}: the file holds {len(stored)} routers, of the layers "
                f"{_listed(stored)}, but {len(own)} are needed: one for {asked} that is asked. "
                "Give gate_layers, or the file of this model's routers."
            )
        for layer in sorted(own):
            first = shapes.get(f"{layer}.w1.weight", ())
            if len(first) == 2 and first[1] != 2 * self.width:
                raise ValueError(
                    f"{who}: the file's routers read states of width {first[1] // 2}, the model's "
                    f"have {self.width}. Give the file of this model's routers."
                )
            if len(first) == 2 and first[0] != self.hidden:
                raise ValueError(
                    f"{who}: the file's routers have hidden={first[0]}, the setting says "
                    f"hidden={self.hidden}. Give hidden={first[0]}."
                )
        return [name for name in shapes if name in self.state_dict()]


def _listed(layers: Iterable[int]) -> str:
    chosen = sorted(layers)
    if len(chosen) > 2 and chosen == list(range(chosen[0], chosen[-1] + 1)):
        return f"{chosen[0]} to {chosen[-1]}"
    return ", ".join(map(str, chosen)) or "none"


@dataclass(frozen=True, eq=False)
class Pooling:
    """Which positions a router reads of each row.

    Attributes:
        weights: [B, 2, N]; of the mean over the text but its last token, and of that last token.
        rule: int64 [B]; see :data:`RULES`.
        tail: How many columns from the right hold everything that is read.
    """

    weights: Float[Tensor, "B 2 N"]
    rule: Int[Tensor, "B"]
    tail: int

    @classmethod
    def of(cls, visual: Bool[Tensor, "B N"], text: Bool[Tensor, "B N"]) -> Pooling:
        """Chooses the text by the rows' visual positions.

        Args:
            visual: Image and video placeholders, line ends between them included.
            text: Everything else that may be read; padding and an answer may not.
        """
        n = visual.shape[1]
        index = torch.arange(n, device=visual.device)
        end = torch.where(visual, index, -1).amax(1, keepdim=True)
        begin = torch.where(visual, index, n).amin(1, keepdim=True)
        after, between = text & (index > end), text & (index > begin)
        rule = torch.where(
            after.any(1),
            AFTER_IMAGE,
            torch.where(between.any(1), BETWEEN, torch.where(text.any(1), ALL_TEXT, NO_TEXT)),
        )
        # A row without an image has text "after the last image" only by the numbers.
        rule = torch.where(visual.any(1) | (rule == NO_TEXT), rule, ALL_TEXT)
        chosen = torch.where(
            (rule == AFTER_IMAGE)[:, None],
            after,
            torch.where((rule == BETWEEN)[:, None], between, text),
        )
        last = torch.where(chosen, index, -1).amax(1, keepdim=True)
        is_last = (index == last) & chosen
        others = chosen & ~is_last
        count = others.sum(1, keepdim=True)
        # One token alone is its own mean.
        mean = torch.where(count > 0, others / count.clamp(min=1), is_last.float())
        first = int(torch.where(chosen, index, n - 1).amin())
        return cls(torch.stack([mean, is_last.float()], dim=1), rule, n - first)

    def features(
        self, x: Float[Tensor, "B M D"], kept: Int[Tensor, "B M"] | None = None
    ) -> Float[Tensor, "B F"]:
        """``[mean ; last]`` of the chosen positions' states, in fp32.

        Args:
            x: States of all positions, or of those that are left.
            kept: Positions of the columns of ``x``, -1 where a row has none; None: all, in order.
        """
        weights = self.weights
        if kept is not None and kept.shape[1] != weights.shape[2]:
            index = kept.clamp(min=0)[:, None].expand(-1, 2, -1)
            weights = weights.gather(2, index).masked_fill((kept < 0)[:, None], 0)
        tail = min(self.tail, x.shape[1])
        return (weights[:, :, -tail:] @ x[:, -tail:].float()).flatten(1)
