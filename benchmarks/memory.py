"""Peak memory of a run, and how it grows with the length of the prompt.

    python -m benchmarks.memory                        every method that edits attention rows
    python -m benchmarks.memory --method "VAR(...)" --device cuda

On a GPU the allocator is asked. On a CPU every tensor that an operation makes is followed until it
is freed, which leaves out the model itself and what a kernel allocates inside: the same for plain
decoding and for a method.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mmlm
from benchmarks.speed_model import (
    PATCH,
    Shape,
    Task,
    build_model,
    build_processor,
    make_task,
)

__all__ = ["PeakBytes", "grown", "growth", "peak_bytes"]

SIDES = (32, 45, 64)
"""Patches of a picture's side: 1,024, 2,025 and 4,096 image tokens."""
SHAPE = Shape(layers=4, tower=(2, 64, 1))


class PeakBytes(TorchDispatchMode):
    """Follows the bytes of all tensors that operations make while it is on.

    Attributes:
        live: bytes that exist now.
        peak: the most that existed at once.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs an operation and counts what it made."""
        # What comes in unknown existed before: weights and inputs, of which views are made.
        self._note(tree_leaves((args, kwargs)), made=False)
        output = func(*args, **(kwargs or {}))
        self._note(tree_leaves(output), made=True)
        return output

    def _note(self, leaves: Iterable[Any], *, made: bool) -> None:
        for leaf in leaves:
            if isinstance(leaf, torch.Tensor):
                storage = leaf.untyped_storage()
                if storage._cdata not in self._known:  # the same for every view of it
                    self._follow(storage, storage.nbytes() if made else 0)

    def _follow(self, storage: torch.UntypedStorage, size: int) -> None:
        key = storage._cdata
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._freed, key, size)

    def _freed(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


def peak_bytes(run: Callable[[], Any], device: str) -> int:
    """The most bytes that a run holds at once beyond what existed before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        run()
        torch.cuda.synchronize()
        return int(torch.cuda.max_memory_allocated() - before)
    with PeakBytes() as follower:
        run()
    return follower.peak


def growth(
    methods: Sequence[mmlm.Method | None],
    *,
    shape: Shape = SHAPE,
    sides: Iterable[int] = SIDES,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, dict[int, int]]:
    """Peak bytes of a prefill and two tokens by method and number of image tokens.

    Args:
        methods: Methods; None stands for plain decoding.
        shape: Sizes of the model; its side is replaced.
        sides: Patches of a picture's side.
        dtype: Of the weights.
        device: Where the model runs.
    """
    peaks: dict[str, dict[int, int]] = {}
    for side in sides:
        sized = replace(shape, side=PATCH * side)
        model = build_model(sized, dtype, device)
        task = make_task(model, build_processor(sized), 1, sized.side)
        for method in methods:
            name = "plain" if method is None else method.label
            peak = peak_bytes(functools.partial(_generate, task, method), device)
            peaks.setdefault(name, {})[sized.image_tokens] = peak
    return peaks


def _generate(task: Task, method: mmlm.Method | None) -> None:
    attached = () if method is None else (method,)
    with mmlm.attach(task.model, *attached, processor=task.processor):
        task.model.generate(**task.inputs, max_new_tokens=3, do_sample=False)


def grown(peaks: dict[int, int]) -> float:
    """The largest local exponent of the growth: 1 is linear in the length, 2 quadratic.

    Between neighbouring lengths n and m it is ``log(b_m / b_n) / log(m / n)`` with bytes b.
    """
    found = sorted(peaks.items())
    return max(math.log(b1 / b0) / math.log(n1 / n0) for (n0, b0), (n1, b1) in pairwise(found))


def attention_methods(layers: int) -> list[mmlm.Method]:
    """The methods that ask for attention rows, for a model of so many layers."""
    from benchmarks.speed import settings

    methods = [mmlm.parse_method(text) for text in settings(layers)]
    return [m for m in methods if m.rows != "none"]


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=__doc__)
    parser.add_argument("--method", action="append", help="text form; default: attention methods")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    methods = [mmlm.parse_method(text) for text in options.method or ()]
    methods = methods or attention_methods(SHAPE.layers)
    peaks = growth([None, *methods], dtype=options.dtype, device=options.device)
    for name, by_length in peaks.items():
        cells = "  ".join(f"{n}: {b / 2**20:.1f} MiB" for n, b in by_length.items())
        print(f"{name:<40} {cells}  exponent {grown(by_length):.2f}")
    if options.output:
        from benchmarks.speed import machine

        record = {"machine": machine(options.device), "dtype": options.dtype, "peaks": peaks}
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
