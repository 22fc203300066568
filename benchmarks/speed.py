"""Speed and memory of every method against plain decoding and against the papers' way to run it.

    python -m benchmarks.speed                                   every method, the default shape
    python -m benchmarks.speed --method "VHR()" --batch 1 4
    python -m benchmarks.speed --device cuda --preset 7b --dtype bfloat16

For each method, plain decoding, ours and the naive one (`benchmarks.naive`) take turns within one
run and are compared by medians, so a drift of the machine's speed cancels. Weights are random: the
time of a forward pass does not depend on them. A run that was stopped goes on with the method that
is missing in ``--output``.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import mmlm
from benchmarks.speed_model import PRESETS, Shape, Task, build_model, build_processor, make_task

if TYPE_CHECKING:
    from mmlm import Method

__all__ = ["Passes", "Run", "count_passes", "main", "measure", "settings", "timed", "variants"]

#: Generates n tokens and calls the given function after each of them.
Run: TypeAlias = Callable[[int, Callable[[], None]], Any]

KEYS = ("prefill", "token", "total")


def settings(layers: int = 8) -> list[str]:
    """Text forms of all decoding methods, at settings that act on a random model.

    What prunes is measured by :mod:`benchmarks.pruning_speed` and :mod:`benchmarks.exit_speed`.
    Sinks of a random model are what stands out a little: the work is that of real ones.

    Args:
        layers: Decoder layers of the model; ACT and ZeroTuning act on four heads of each.
    """
    heads = f"heads_by_layer=({', '.join(f'({i}, (0, 1, 2, 3))' for i in range(layers))},)"
    told = {
        "ACT": (f"ACT(theta=0.003, {heads})",),
        "PAI": ("PAI(gamma=1.0)", "PAI()"),
        "VAR": ("VAR(tau=2.5, sink_dims=(3, 5))",),
        "HeadAblation": (f"HeadAblation({heads})",),
        "PH3": (f"PH3({heads})",),
        "SeeingKnowing": ("SeeingKnowing(image_heads=((1, (0,)),), memory_heads=((1, (1,)),))",),
        "StreamingHeads": (f"StreamingHeads(sink=4, recent=64, {heads})",),
        "ZeroTuning": (f"ZeroTuning({heads})",),
    }
    return [
        text for name in mmlm.method_names("decoding") for text in told.get(name, (f"{name}()",))
    ]


def variants(task: Task, method: Method) -> dict[str, Run]:
    """Plain decoding, the method, and the method as its paper's repository runs it."""
    from benchmarks.naive import NAIVE

    def generate(attached: tuple[Method, ...], n: int, tick: Callable[[], None]) -> Any:
        def stop(ids: Any, scores: Any, **_: Any) -> Any:
            tick()
            return ids.new_zeros(ids.shape[0], dtype=bool)

        with mmlm.attach(task.model, *attached, processor=task.processor):
            return task.model.generate(
                **task.inputs, max_new_tokens=n, do_sample=False, stopping_criteria=[stop]
            )

    runs: dict[str, Run] = {
        "plain": functools.partial(generate, ()),
        "ours": functools.partial(generate, (method,)),
    }
    naive = NAIVE.get(type(method).__name__)
    if naive is not None:
        runs["naive"] = functools.partial(naive, method, task)
    return runs


def measure(runs: Mapping[str, Run], task: Task, tokens: int, rounds: int) -> dict[str, Any]:
    """Medians over rounds in which all variants run in turn.

    Args:
        runs: Name -> function that generates the given number of tokens.
        task: For synchronisation on an accelerator.
        tokens: New tokens of each run.
        rounds: Counted rounds, after a short one that only warms up.

    Returns:
        Name -> ``prefill`` (seconds to the first token), ``token`` (seconds per later token) and
        ``total`` seconds.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for i in range(rounds + 1):
        for name, run in runs.items():
            row = timed(run, task, tokens if i else 3)
            if i:
                times[name].append(row)
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in KEYS}
        for name, rows in times.items()
    }


def timed(run: Run, task: Task, tokens: int) -> dict[str, float]:
    """One run. A search has no moment at which a token is there: its first token is run alone."""
    stamps: list[float] = []
    began = _now(task)
    run(tokens, lambda: stamps.append(_now(task)))
    total = _now(task) - began
    if len(stamps) == tokens:
        steps = [b - a for a, b in itertools.pairwise(stamps)]
        prefill, token = stamps[0] - began, statistics.median(steps)
    else:
        again = _now(task)
        run(1, _nothing)
        prefill = _now(task) - again
        token = (total - prefill) / (tokens - 1)
    return {"prefill": prefill, "token": token, "total": total}


def _nothing() -> None:
    """Stands in where nobody counts tokens."""


def _now(task: Task) -> float:
    if task.model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()
    return time.perf_counter()


@dataclass
class Passes:
    """What a run sends through the model.

    Attributes:
        prompt: (decoder passes, their positions) before the first token.
        token: (decoder passes, their positions) per later token.
        pictures: pictures through the vision tower.
    """

    prompt: tuple[int, int]
    token: tuple[float, float]
    pictures: int


def count_passes(run: Run, task: Task, tokens: int = 4) -> Passes:
    """Counts forward passes of the decoder and of the tower in one run."""
    from mmlm.engine.anatomy import Anatomy

    anatomy = Anatomy(task.model)
    calls: list[list[int]] = [[]]  # positions of each pass, token by token
    pictures = 0

    def decoder(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        rows, length = kwargs["inputs_embeds"].shape[:2]
        calls[-1].append(rows * length)

    def tower(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        nonlocal pictures
        pictures += (args[0] if args else kwargs["pixel_values"]).shape[0]

    with ExitStack() as stack:  # pre-hooks: some passes end before their last layer
        for module, hook in ((anatomy.text, decoder), (anatomy.tower, tower)):
            stack.callback(module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        run(tokens, lambda: calls.append([]))
    later = [call for step in calls[1:] for call in step]
    steps = tokens - 1
    return Passes(
        (len(calls[0]), sum(calls[0])),
        (len(later) / steps, sum(later) / steps),
        pictures,
    )


def group(task: Task, method: Method, tokens: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Everything about one method at one batch size: times, passes and peak memory."""
    from benchmarks.memory import peak_bytes

    runs = variants(task, method)
    rows = measure(runs, task, tokens, rounds)
    for name, run in runs.items():
        passes = count_passes(run, task)
        peak = peak_bytes(functools.partial(run, 3, _nothing), str(task.model.device))
        rows[name] |= {
            "prompt_passes": passes.prompt[0],
            "prompt_positions": passes.prompt[1],
            "token_passes": passes.token[0],
            "token_positions": passes.token[1],
            "pictures": passes.pictures,
            "peak_bytes": peak,
        }
    return rows


def machine(device: str) -> dict[str, Any]:
    """What ran the measurement."""
    import torch

    if torch.device(device).type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        lines = Path("/proc/cpuinfo")
        names = (
            [line for line in lines.read_text().splitlines() if line.startswith("model name")]
            if lines.exists()
            else []
        )
        name = names[0].partition(":")[2].strip() if names else platform.machine()
    return {
        "name": name,
        "threads": torch.get_num_threads(),
        **{package: version(package) for package in ("torch", "transformers", "mmlm")},
    }


def write_report(path: Path, device: str, facts: dict[str, Any]) -> None:
    """Writes what a benchmark found, and what ran it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"machine": machine(device), **facts}, indent=1)
    path.write_text(text + "\n", encoding="utf-8")


def commit() -> str:
    """The commit that was measured; "-dirty" behind it if code differs; "unknown" without git."""
    root = Path(__file__).parents[1]

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", *words], cwd=root, capture_output=True, text=True, check=False
        )
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--", "mmlm", "decoding", "benchmarks/*.py")
    return (git("rev-parse", "--short", "HEAD") or "unknown") + ("-dirty" if changed else "")


def show(results: Mapping[str, Mapping[str, Any]]) -> None:
    """Prints one table per batch size: ratios to plain decoding and to the naive run."""
    from rich.console import Console
    from rich.table import Table

    batches = sorted({int(batch) for rows in results.values() for batch in rows})
    for batch in batches:
        table = Table(title=f"batch {batch}")
        columns = ("method", "prefill", "per token", "total", "naive: total", "ours / naive")
        for column in (*columns, "memory", "naive: memory"):
            table.add_column(column, justify="left" if column == "method" else "right")
        for text, rows in results.items():
            if str(batch) in rows:
                table.add_row(short(text), *_ratios(rows[str(batch)]))
        Console().print(table)


def short(label: str) -> str:
    """A label without what only tells the method about the model."""
    name, _, rest = label.partition("(")
    told = ("heads_by_layer", "image_heads", "sink_dims", "tau", "theta")
    return name if any(word in rest for word in told) else label


def _ratios(rows: Mapping[str, Any]) -> list[str]:
    plain, ours, naive = rows["plain"], rows["ours"], rows.get("naive")
    cells = [f"{ours[key] / plain[key]:.3f}" for key in KEYS]
    cells += [f"{naive['total'] / plain['total']:.3f}"] if naive else ["-"]
    cells += [f"{ours['total'] / naive['total']:.3f}"] if naive else ["-"]
    cells += [f"{ours['peak_bytes'] / plain['peak_bytes']:.2f}"]
    return [*cells, f"{naive['peak_bytes'] / plain['peak_bytes']:.2f}" if naive else "-"]


def main(argv: Sequence[str] | None = None) -> int:
    """Measures and prints; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--method", action="append", help="text form; default: every method")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="small")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", type=Path, help="JSON file; what it holds is not repeated")
    options = parser.parse_args(argv)

    shape: Shape = PRESETS[options.preset]
    record = _opened(options, shape)
    model = build_model(shape, options.dtype, options.device)
    processor = build_processor(shape)
    for text in options.method or settings(shape.layers):
        method = mmlm.parse_method(text)
        done = record["results"].setdefault(method.label, {})
        for batch in options.batch:
            if str(batch) in done:
                continue
            task = make_task(model, processor, batch, shape.side)
            rows = group(task, method, options.tokens, options.rounds)
            done[str(batch)] = {**rows, "commit": commit()}
            print(method.label, batch, *_ratios(done[str(batch)]), file=sys.stderr, flush=True)
            if options.output:
                text_form = json.dumps(record, indent=1) + "\n"
                options.output.write_text(text_form, encoding="utf-8")
    show(record["results"])
    return 0


def _opened(options: argparse.Namespace, shape: Shape) -> dict[str, Any]:
    """The record of an earlier run with the same setting, or a new one."""
    setting = {
        "preset": options.preset,
        "image_tokens": shape.image_tokens,
        "tokens": options.tokens,
        "rounds": options.rounds,
        "dtype": options.dtype,
        "machine": machine(options.device),
    }
    if options.output and options.output.exists():
        stored: dict[str, Any] = json.loads(options.output.read_text(encoding="utf-8"))
        if stored["setting"] == setting:
            return stored
        raise SystemExit(f"{options.output} was measured with another setting; move it away")
    return {"setting": setting, "results": {}}


if __name__ == "__main__":
    sys.exit(main())
