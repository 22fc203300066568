"""What looking costs: the time of a token with a probe in six layers over that without.

    python -m benchmarks.probe_overhead --preset deep --output docs/results/probe_overhead.json

Plain decoding and every probe take turns within each round and are compared within it, so a drift
of the machine's speed cancels. Weights are random: no time depends on them. The layers are two
early, two central and two late ones, as :class:`mmlm.TextDominance` measures them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import mmlm
from benchmarks.speed import Run, commit, timed, variants, write_report
from benchmarks.speed_model import PRESETS, Task, build_model, build_processor, make_task
from mmlm.engine.stages import measured_layers

__all__ = ["interval", "main", "overhead", "probes"]

LIMIT = 0.03
"""The most that measuring six layers may add to the time of a token."""


def probes(n_layers: int) -> tuple[str, ...]:
    """Text forms of the probes that look at the rows of new tokens, in six layers."""
    layers = measured_layers(n_layers)
    return (
        f"TextDominance(layers={layers})",
        f"AttentionMap(layers={layers})",
        f"VisualHeads(layers={layers})",
        f"AttentionSinks(queries='generated', layers={layers})",
    )


def overhead(
    runs: Mapping[str, Run], task: Task, tokens: int, rounds: int
) -> dict[str, dict[str, Any]]:
    """Ratios of each probe's time per token to plain decoding in the same round.

    Args:
        runs: Name -> function that generates; "plain" is among them.
        task: For synchronisation on an accelerator.
        tokens: New tokens of each run.
        rounds: Counted rounds, after a short one that only warms up.

    Returns:
        Name -> ``ratio`` (median over rounds), its 95 % ``interval``, and the medians in seconds.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(rounds + 1):
        # Every second round backwards: nobody always runs behind the same neighbour.
        order = list(runs.items())[:: 1 if number % 2 else -1]
        for name, run in order:
            row = timed(run, task, tokens if number else 3)
            if number:
                times[name].append(row["token"])
    plain = times.pop("plain")
    found = {}
    for name, own in times.items():
        ratios = [probe / alone for probe, alone in zip(own, plain, strict=True)]
        found[name] = {
            "ratio": statistics.median(ratios),
            "interval": interval(ratios),
            "seconds": statistics.median(own),
            "plain_seconds": statistics.median(plain),
        }
    return found


def interval(ratios: Sequence[float], draws: int = 2000, seed: int = 0) -> list[float]:
    """95 % bootstrap interval of a median over rounds."""
    import numpy as np

    values = np.asarray(ratios)
    picked = np.random.default_rng(seed).integers(0, len(values), (draws, len(values)))
    low, high = np.quantile(np.median(values[picked], axis=1), (0.025, 0.975))
    return [float(low), float(high)]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.probe_overhead")
    parser.add_argument("--probe", action="append", help="text form; default: four probes")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="deep")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--tokens", type=int, default=24)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file")
    options = parser.parse_args(argv)

    shape = PRESETS[options.preset]
    model = build_model(shape, options.dtype, options.device)
    task = make_task(model, build_processor(shape), options.batch, shape.side)
    chosen = tuple(options.probe or probes(shape.layers))
    runs: dict[str, Run] = {}
    for text in chosen:
        both = variants(task, mmlm.parse_method(text))
        runs |= {"plain": both["plain"], text: both["ours"]}
    found = overhead(runs, task, options.tokens, options.rounds)
    for text, row in found.items():
        low, high = row["interval"]
        print(f"{text}: {row['ratio']:.4f} of plain decoding [{low:.4f}, {high:.4f}]")
    if options.output:
        setting = {n: getattr(options, n) for n in ("preset", "batch", "tokens", "rounds", "dtype")}
        facts = {"setting": setting | {"image_tokens": shape.image_tokens}, "commit": commit()}
        write_report(options.output, options.device, {**facts, "limit": LIMIT, "results": found})
    return 0


if __name__ == "__main__":
    sys.exit(main())
