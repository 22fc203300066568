"""A number for every head of a model, measured once: a file that methods on heads read."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from mmlm.engine.selections import by_layer

__all__ = ["Head", "HeadMap", "random_heads"]

#: (layer, head)
Head: TypeAlias = tuple[int, int]

FORMAT = "mmlm head map 1"
#: Fewer scored steps make a map unreliable.
FEW = 50
_ADVICE = "make one with `mmlm calibrate heads --kind visual`"


@dataclass(frozen=True, kw_only=True, eq=False)
class HeadMap:
    """What was measured of every head of a model.

    Attributes:
        kind: "visual" or "text".
        values: fp64 [N_l, H] by what was measured; NaN where nothing could be.
        rank: Which of the values heads are ranked by.
        threshold: Heads of this kind have more than this of it.
        counted: How much was measured: samples, counted ones, scored steps and so on.
        facts: The model's name, weights and number format, the attention kernel, the seed.
    """

    kind: str
    values: Mapping[str, Float[Tensor, "N_l H"]]
    rank: str
    threshold: float = 0.1
    counted: Mapping[str, int] = field(default_factory=dict)
    facts: Mapping[str, Any] = field(default_factory=dict)

    @property
    def score(self) -> Float[Tensor, "N_l H"]:
        """The value that heads are ranked by."""
        return self.values[self.rank]

    @property
    def shape(self) -> tuple[int, int]:
        """Layers and heads of the model."""
        n_layers, n_heads = self.score.shape
        return n_layers, n_heads

    @property
    def few(self) -> bool:
        """Whether there were too few scored steps to trust it."""
        return self.counted.get("steps", 0) < FEW

    @property
    def heads(self) -> tuple[Head, ...]:
        """Heads of this kind, the strongest first: above the threshold, and above chance."""
        above = self.score > self.threshold
        if "hit_excess" in self.values:
            above &= self.values["hit_excess"] > 0
        return self.top(int(above.sum()), above) if bool(above.any()) else ()

    def top(self, k: int, among: Tensor | None = None) -> tuple[Head, ...]:
        """The strongest heads; of equal ones the first.

        Args:
            k: How many.
            among: Bool [N_l, H]; only these.

        Raises:
            ValueError: If there are not so many, or nothing was measured.
        """
        if bool(self.score.isnan().any()):
            raise ValueError("no head was measured: no sample counted")
        n_layers, n_heads = self.shape
        if not 1 <= k <= n_layers * n_heads:
            raise ValueError(f"{k} heads of {n_layers} x {n_heads}; give 1 to {n_layers * n_heads}")
        score = self.score if among is None else self.score.masked_fill(~among, -math.inf)
        order = score.flatten().argsort(descending=True, stable=True)[:k].tolist()
        return tuple(divmod(index, n_heads) for index in order)

    def fraction(self, share: float) -> int:
        """How many heads a share of all is, at least one."""
        return max(1, round(share * self.score.numel()))

    def as_json(self) -> dict[str, Any]:
        """Everything in plain JSON; null where there is no number."""
        return {
            "format": FORMAT,
            "kind": self.kind,
            "rank": self.rank,
            "threshold": self.threshold,
            "shape": list(self.shape),
            "counted": dict(self.counted),
            "few": self.few,
            **dict(self.facts),
            "heads": [list(head) for head in self.heads],
            "values": {name: _numbers(value) for name, value in self.values.items()},
        }

    def save(self, path: str | Path) -> None:
        """Writes a JSON file, whole or not at all."""
        path = Path(path)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        temporary.write_text(json.dumps(self.as_json(), allow_nan=False) + "\n", encoding="utf-8")
        temporary.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> HeadMap:
        """Reads a file that :meth:`save` wrote.

        Raises:
            ValueError: If there is no such file, or it is none of ours.
        """
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"there is no file {str(path)!r}; {_ADVICE}")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if content.pop("format") != FORMAT:
                raise ValueError("another format")
            shape = tuple(content.pop("shape"))
            values = {name: _tensor(value) for name, value in content.pop("values").items()}
            if any(tuple(value.shape) != shape for value in values.values()):
                raise ValueError("values of another shape")
            for derived in ("few", "heads"):
                content.pop(derived)
            named = {n: content.pop(n) for n in ("kind", "rank", "threshold", "counted")}
            if named["rank"] not in values:
                raise ValueError("the ranked value is missing")
            return cls(values=values, facts=content, **named)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{str(path)!r} is no map of heads ({error}); {_ADVICE}") from error


def random_heads(top: Sequence[Head], shape: tuple[int, int], seed: int) -> tuple[Head, ...]:
    """As many heads as there are on top, in the same layers, but none of those: a control.

    Args:
        top: The heads that the control is for.
        shape: Layers and heads of the model.
        seed: Equal seeds draw equal heads.

    Raises:
        ValueError: If more than half of a layer's heads are on top.
    """
    drawn: list[Head] = []
    generator = torch.Generator().manual_seed(seed)
    for layer, chosen in by_layer(top):
        others = [head for head in range(shape[1]) if head not in chosen]
        if len(others) < len(chosen):
            raise ValueError(
                f"{len(chosen)} of the {shape[1]} heads of layer {layer} are on top; the "
                f"{len(others)} others are too few for a control"
            )
        order = torch.randperm(len(others), generator=generator)[: len(chosen)]
        drawn += [(layer, others[index]) for index in order.tolist()]
    return tuple(sorted(drawn))


def _numbers(value: Tensor) -> list[list[float | None]]:
    return [[None if math.isnan(x) else x for x in row] for row in value.tolist()]


def _tensor(value: list[list[float | None]]) -> Tensor:
    rows = [[math.nan if x is None else x for x in row] for row in value]
    return torch.tensor(rows, dtype=torch.float64)
