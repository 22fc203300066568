"""A method with weights that learn, in a few lines."""

from dataclasses import dataclass
from typing import ClassVar

import torch

from mmlm import Method
from mmlm.engine.method import Paper


@dataclass(frozen=True, kw_only=True)
class Shift(Method):
    """Adds a learned vector to one layer's output."""

    paper: ClassVar[Paper] = Paper(title="made for a test", arxiv="0", year=2026, venue="here")
    fresh_is_valid: ClassVar[bool] = True
    at: int = 1

    def neutral(self):
        return self

    def modules(self, anatomy):
        part = torch.nn.Module()
        part.vector = torch.nn.Parameter(torch.zeros(anatomy.width))
        return part

    def begin(self, prompt):
        return prompt.module(self).vector

    def layer_out(self, state, layer, x):
        return x + state if layer == self.at else None
