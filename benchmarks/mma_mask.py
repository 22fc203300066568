"""What MMA's mask costs: the time to build it, as a share of the prefill.

    python -m benchmarks.mma_mask                   N = 2048, 8 rows, sdpa, float32, one CPU thread
    python -m benchmarks.mma_mask --device cuda --preset 7b --dtype bfloat16

The mask of a prompt is built once, from the layout, and handed to all layers. Times are of this
process (``--clock process``, the default on a CPU: other work on the machine does not count) or of
the wall; the smallest of several runs counts.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

import mmlm
from benchmarks.speed_model import PATCH, PRESETS, Task, build_model, build_processor, make_task
from mmlm.engine.masks.openings import Openings

__all__ = ["measure"]

RESULTS = Path(__file__).parent / "results"
POSITIONS, ROWS = 2048, 8
BAR = 0.05


def measure(task: Task, method: mmlm.Method, repeats: int, clock: Callable[[], float]) -> Any:
    """Seconds of the prefill, and of building the mask within it.

    Args:
        task: Model and inputs.
        method: What opens attention.
        repeats: Runs; the fastest counts.
        clock: Seconds.

    Returns:
        ``{"plain": s, "prefill": s, "mask": s, "share": mask / prefill}``.
    """
    plain = min(_prefill(task, clock) for _ in range(repeats))
    spent: list[float] = []
    build = Openings.on_text

    def timed(self: Openings, *args: Any) -> Any:
        began = clock()
        made = build(self, *args)
        _wait(task)
        spent.append(clock() - began)
        return made

    Openings.on_text = timed  # type: ignore[method-assign]
    try:
        with mmlm.attach(task.model, method, processor=task.processor):
            runs = [_prefill(task, clock) for _ in range(repeats)]
    finally:
        Openings.on_text = build  # type: ignore[method-assign]
    mask, prefill = min(spent), min(runs)
    return {"plain": plain, "prefill": prefill, "mask": mask, "share": mask / prefill}


@torch.no_grad()
def _prefill(task: Task, clock: Callable[[], float]) -> float:
    began = clock()
    task.model(**task.inputs, use_cache=True, logits_to_keep=1)
    _wait(task)
    return clock() - began


def _wait(task: Task) -> None:
    if task.model.device.type == "cuda":
        torch.cuda.synchronize()


def main() -> int:
    """Measures and writes a JSON file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--attention", default="sdpa")
    parser.add_argument("--preset", default="small", choices=sorted(PRESETS))
    parser.add_argument("--method", default="MMA()")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--clock", choices=("process", "wall"), default=None)
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    torch.set_num_threads(1)
    # A square of patches that leaves room for the question: 44 * 44 image tokens of 2048.
    side = int((POSITIONS - 64) ** 0.5)
    shape = replace(PRESETS[options.preset], side=PATCH * side, tower=(2, 64, 1))
    model = build_model(shape, options.dtype, options.device)
    model.set_attn_implementation({"text_config": options.attention})
    task = make_task(model, build_processor(shape), ROWS, shape.side)
    rows, length = task.inputs["input_ids"].shape
    task = replace(task, questions=tuple(q + " w7" * (POSITIONS - length) for q in task.questions))
    assert task.inputs["input_ids"].shape == (rows, POSITIONS)
    name = options.clock or ("process" if options.device == "cpu" else "wall")
    clock = time.process_time if name == "process" else time.perf_counter
    found = measure(task, mmlm.parse_method(options.method), options.repeats, clock)
    record = {
        "positions": POSITIONS,
        "rows": ROWS,
        **{key: getattr(options, key) for key in ("device", "dtype", "attention", "preset")},
        "method": options.method,
        "clock": name,
        "seconds": {key: round(found[key], 4) for key in ("plain", "prefill", "mask")},
        "share": round(found["share"], 5),
        "bar": BAR,
        "versions": {package: version(package) for package in ("torch", "transformers")},
    }
    path = options.output or RESULTS / f"mma-mask-{options.device}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(record, indent=1))
    return int(found["share"] >= BAR)


if __name__ == "__main__":
    sys.exit(main())
