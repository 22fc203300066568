"""How many pictures of the embedded world one core draws in a second.

    OMP_NUM_THREADS=1 python tools/world_speed.py [--count 2000] [--split train]

Cold: the sprite cache starts empty, as in a new process. Warm: the same scenes again. The median
of several rounds is printed, because other programs may share the machine.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable

import numpy as np

from data_tools.world import SPLITS, caption, questions, render, scene
from data_tools.world.sprites import clear_cache


def rate(work: Callable[[int], object], count: int) -> float:
    """Calls per second of `work(0) ... work(count - 1)`."""
    start = time.perf_counter()
    for index in range(count):
        work(index)
    return count / (time.perf_counter() - start)


def main() -> None:
    """Measure and print one line per kind of work."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="scenes per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--split", default="train", choices=SPLITS)
    args = parser.parse_args()
    config = SPLITS[args.split]

    def truth(index: int) -> object:
        return scene(config, 0, index, args.split)

    def picture(index: int) -> object:
        return render(scene(config, 0, index, args.split))

    def everything(index: int) -> object:
        drawn = scene(config, 0, index, args.split)
        rng = np.random.default_rng(index)
        return render(drawn), caption(drawn, rng), questions(drawn, rng)

    figures: dict[str, list[float]] = {}
    for _ in range(args.rounds):
        clear_cache()
        figures.setdefault("pictures, cold cache", []).append(rate(picture, args.count))
        figures.setdefault("pictures, warm cache", []).append(rate(picture, args.count))
        figures.setdefault("pictures, captions and questions", []).append(
            rate(everything, args.count)
        )
        figures.setdefault("scenes without picture", []).append(rate(truth, args.count))
    print(f"{args.split}, {args.count} scenes, {args.rounds} rounds, {platform.processor()}")
    for name, rates in figures.items():
        print(f"{name:34s} {statistics.median(rates):8.0f} per second  (lowest {min(rates):.0f})")


if __name__ == "__main__":
    main()
