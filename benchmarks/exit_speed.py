"""Speed of a prompt's first pass when visual tokens exit (DyVTE), against what operations predict.

    python -m benchmarks.exit_speed                       576 and 2880 visual tokens, on the CPU
    python -m benchmarks.exit_speed --device cuda --preset 7b --dtype bfloat16

Three questions, each answered by runs that take turns and by medians, so a drift of the machine's
speed cancels: how much faster is the first pass with an exit after a quarter or half of the layers
(the model of operations is `mmlm.engine.flops`; at least half of its ratio is asked for); what do
routers cost that are asked after every layer and never fire (at most 5 % on a CPU, 2 % on a GPU);
and what "split" gains over "exact" in a batch of which half exits. The image tower does not run: it
costs the same in all of them. Weights are random, prompts come as embeddings.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

import mmlm
from benchmarks.speed import write_report
from benchmarks.speed_model import IMAGE, PRESETS, Shape, build_model
from mmlm import DyVTE
from mmlm.engine import flops
from mmlm.engine.layout import TokenLayout

__all__ = ["main", "measure"]

TEXT = 64
"""Text tokens of a prompt; 35 of them before the picture, as in LLaVA-1.5."""
BEFORE = 35
VISUAL = (576, 2880)
#: The papers' ratios (MLP 2.7 times the width, heads of 64), as small as a CPU needs it.
SHAPE = Shape(layers=8, width=256, heads=4, intermediate=688, tower=(1, 64, 1))


@dataclass(frozen=True, kw_only=True)
class Untrained(DyVTE):
    """Routers that nobody trained: what they decide does not matter here."""

    fresh_is_valid: ClassVar[bool] = True


@dataclass(frozen=True, kw_only=True)
class HalfExits(Untrained):
    """The first half of a batch exits after a layer; the routers are asked all the same."""

    at: int = 0

    def _votes(self, state: Any, gate: int, x: Tensor) -> Tensor:
        votes = super()._votes(state, gate, x)
        half = torch.arange(len(votes), device=votes.device) < len(votes) // 2
        return half & (gate == self.at)


class _Prompts:
    """Prompts of one length with one picture each, as embeddings."""

    def __init__(self, model: Any, visual: int, rows: int) -> None:
        self._model, device = model, model.device
        ids = torch.full((rows, TEXT + visual), 7, device=device)
        ids[:, BEFORE : BEFORE + visual] = IMAGE
        self.length = ids.shape[1]
        self._layout = TokenLayout.from_ids(ids, None, image_ids=(IMAGE,))
        width = model.config.text_config.hidden_size
        self._embeds = torch.randn(rows, self.length, width, device=device, dtype=model.dtype)

    def seconds(self, method: DyVTE | None) -> float:
        """Seconds of one first pass, its cache filled."""
        methods = () if method is None else (method,)
        with torch.no_grad(), mmlm.attach(self._model, *methods, layout=self._layout):
            self._wait()
            began = self._clock()
            self._model(inputs_embeds=self._embeds, use_cache=True, logits_to_keep=1)
            self._wait()
            return self._clock() - began

    def _clock(self) -> float:
        """Seconds; on a CPU those of this process, which others on the machine do not lengthen."""
        on_gpu = self._model.device.type == "cuda"
        return time.perf_counter() if on_gpu else time.process_time() / torch.get_num_threads()

    def _wait(self) -> None:
        if self._model.device.type == "cuda":
            torch.cuda.synchronize()


def _turns(runs: dict[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Seconds of every variant, one after the other in each round; a first round warms up."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(repeats + 1):
        for name, run in runs.items():
            seconds = run()
            if number:
                found[name].append(seconds)
    return found


def _ratio(slow: list[float], fast: list[float]) -> float:
    """Median of the rounds' ratios: neighbours in time saw the same machine."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def measure(
    model: Any, *, visual: Sequence[int] = VISUAL, repeats: int = 7, hidden: int = 256
) -> dict[str, Any]:
    """All three comparisons.

    Args:
        model: a LLaVA.
        visual: visual tokens of a prompt.
        repeats: rounds.
        hidden: width of the routers.
    """
    config = model.config.text_config
    layers = config.num_hidden_layers
    record: dict[str, Any] = {"exits": [], "routers": [], "split": []}
    for count in visual:
        prompts = _Prompts(model, count, 1)
        n = prompts.length
        for e in (layers // 4, layers // 2):
            method = DyVTE.fixed(layer=e)
            times = _turns(
                {
                    "plain": lambda p=prompts: p.seconds(None),
                    "exit": lambda p=prompts, m=method: p.seconds(m),
                },
                repeats,
            )
            lengths = [n] * (e + 1) + [TEXT] * (layers - e - 1)
            whole = flops.prefill(config, [n] * layers, causal=True)
            predicted = whole / flops.prefill(config, lengths, causal=True)
            faster = _ratio(times["plain"], times["exit"])
            record["exits"].append(
                {
                    "visual": count,
                    "exit_layer": e,
                    "predicted": predicted,
                    "faster": faster,
                    "passes": faster >= predicted / 2,
                    "seconds": {name: statistics.median(t) for name, t in times.items()},
                }
            )
        never = Untrained(hidden=hidden, threshold=float("inf"))
        times = _turns(
            {
                "plain": lambda p=prompts: p.seconds(None),
                "asked": lambda p=prompts, m=never: p.seconds(m),
            },
            # Little to be seen: as many rounds as make some seconds.
            repeats * max(2, 6000 // count),
        )
        cost = 100 * (_ratio(times["asked"], times["plain"]) - 1)
        limit = 2.0 if model.device.type == "cuda" else 5.0
        record["routers"].append(
            {"visual": count, "percent_slower": cost, "limit": limit, "passes": cost <= limit}
        )
    prompts = _Prompts(model, visual[0], 4)
    modes = {
        mode: HalfExits(hidden=hidden, at=layers // 4, batch=mode) for mode in ("exact", "split")
    }
    times = _turns(
        {name: lambda m=method: prompts.seconds(m) for name, method in modes.items()}, repeats
    )
    record["split"].append(
        {
            "visual": visual[0],
            "rows": 4,
            "exited": 2,
            "exit_layer": layers // 4,
            "faster": _ratio(times["exact"], times["split"]),
        }
    )
    return record


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes a JSON file; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: 8 layers of width 256")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--hidden", type=int, default=256, help="width of the routers")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/results/exit-cpu.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    shape = PRESETS[given.preset] if given.preset else SHAPE
    model = build_model(shape, given.dtype, given.device)
    record = measure(model, repeats=given.repeats, hidden=given.hidden)
    sizes = {"layers": shape.layers, "width": shape.width, "hidden": given.hidden}
    facts = {"dtype": given.dtype, "sizes": sizes, **record}
    write_report(Path(given.output), given.device, facts)
    for kind, rows in record.items():
        for row in rows:
            print(kind, json.dumps(row))
    met = all(row.get("passes", True) for rows in record.values() for row in rows)
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
