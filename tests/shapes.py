"""Shapes of everything that is computed inside a block: what shows that no N x N tensor is made."""

from __future__ import annotations

import contextlib
import math
from collections import Counter

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Recorder(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.shapes = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.alias.default:  # another name for a tensor, not another tensor
            return made
        for leaf in tree_leaves(made):
            if isinstance(leaf, torch.Tensor):
                self.shapes[str(func), tuple(leaf.shape), leaf.dtype] += 1
        return made


@contextlib.contextmanager
def record_shapes():
    """Yields a Counter of (operator, shape, dtype) over all tensors that are made inside.

        with record_shapes() as shapes:
            model(**inputs)
        assert_no_square(shapes, 100)

    Tensors that live inside a fused kernel are not seen, which is the point.
    """
    recorder = _Recorder()
    with recorder:
        yield recorder.shapes


def largest(shapes):
    """How many numbers the largest tensor has."""
    return max(math.prod(shape) for _, shape, _ in shapes)


def assert_no_square(shapes, n, *, masks=False):
    """No tensor has two sides of at least ``n``, as an attention matrix of ``n`` positions has.

    Args:
        shapes: of ``record_shapes``.
        n: positions; choose it larger than every width of the model.
        masks: allow bool tensors without a side for heads (a mask that a method must open).
    """
    assert shapes, "nothing was recorded, so nothing is tested"
    found = [
        (name, shape, dtype, count)
        for (name, shape, dtype), count in shapes.items()
        if sum(side >= n for side in shape) > 1
        and not (masks and dtype == torch.bool and (len(shape) < 4 or shape[1] == 1))
    ]
    assert not found, f"tensors of {n} x {n} or more: {found}"
