"""Latency of every method relative to plain decoding, on a random model of fixed shape.

    python -m benchmarks.speed                       # every method, the default shape
    python -m benchmarks.speed --method "VHR()" --batch 1 4

All variants are measured in turn within one run (plain, method, plain, method, ...) and reported as
ratios of medians, so a drift of the machine's speed cancels. Weights are random: the time of a
forward pass does not depend on them. VCD is also compared with the loop of the papers' code: two
sequential passes per token, each with its own cache and its own tower pass.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

from rich.console import Console
from rich.progress import track
from rich.table import Table

if TYPE_CHECKING:
    import torch

    from mmlm import Method

__all__ = ["build_model", "main", "measure", "naive_contrast"]

IMAGE_TOKENS = 576
TEXT_TOKENS = 40


def build_model(layers: int, width: int, dtype: str, device: str) -> Any:
    """A random LLaVA: CLIP tower with 24 x 24 patches, Llama decoder with heads of size 64."""
    import torch
    from transformers import (
        CLIPVisionConfig,
        GenerationConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=336,
        patch_size=14,
    )
    text = LlamaConfig(
        vocab_size=32064,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_id=32000)
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    # No end token: every run generates the full length.
    model.generation_config = GenerationConfig(pad_token_id=0, eos_token_id=None)
    return model.to(device=device, dtype=getattr(torch, dtype))


def make_inputs(model: Any, batch: int) -> dict[str, torch.Tensor]:
    """One image and a short question per row, the same length in every row."""
    import torch

    generator = torch.Generator().manual_seed(1)
    text = torch.randint(10, 30000, (batch, TEXT_TOKENS), generator=generator)
    image = torch.full((batch, IMAGE_TOKENS), 32000)
    pixels = torch.randn(batch, 3, 336, 336, generator=generator)
    ids = torch.cat([text[:, :8], image, text[:, 8:]], dim=1)
    return {
        "input_ids": ids.to(model.device),
        "attention_mask": torch.ones_like(ids).to(model.device),
        "pixel_values": pixels.to(model.device, model.dtype),
    }


def naive_contrast(
    model: Any, inputs: dict[str, torch.Tensor], method: Any, tokens: int, tick: Callable[[], None]
) -> torch.Tensor:
    """VCD as the papers' code runs it: per token one pass with the image, then one with noise.

    Each pass has its own cache and its own run of the tower, and the two follow one another.
    ``tick`` is called after every token.
    """
    import math

    import torch

    kept = method.noised.kept
    pixels = inputs["pixel_values"]
    noised = math.sqrt(kept) * pixels + math.sqrt(1 - kept) * torch.randn_like(pixels)
    branches: list[dict[str, Any]] = [
        {**inputs, "pixel_values": pixels},
        {**inputs, "pixel_values": noised},
    ]
    chosen = []
    with torch.no_grad():
        for _ in range(tokens):
            z = []
            for branch in branches:
                output = model(**branch, use_cache=True, logits_to_keep=1)
                branch["past_key_values"] = output.past_key_values
                z.append(output.logits[:, -1].float())
            edited = (1 + method.alpha) * z[0] - method.alpha * z[1]
            floor = z[0].amax(-1, keepdim=True) + math.log(method.beta)
            token = edited.masked_fill(z[0] < floor, -math.inf).argmax(-1, keepdim=True)
            chosen.append(token)
            tick()
            for branch in branches:
                branch.pop("pixel_values", None)
                mask = branch["attention_mask"]
                branch["attention_mask"] = torch.cat([mask, torch.ones_like(token)], dim=1)
                branch["input_ids"] = token
    return torch.cat(chosen, dim=1)


def _synchronise(model: Any) -> None:
    if model.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


#: Generates n tokens and calls the given function after each of them.
Run: TypeAlias = "Callable[[int, Callable[[], None]], Any]"


def measure(
    runs: dict[str, Run], model: Any, tokens: int, rounds: int
) -> dict[str, dict[str, float]]:
    """Medians over rounds in which all variants run in turn.

    Args:
        runs: Name -> function that generates the given number of tokens.
        model: For synchronisation on an accelerator.
        tokens: New tokens of each run.
        rounds: Counted rounds, after one that only warms up.

    Returns:
        Name -> ``prefill`` (seconds to the first token), ``token`` (seconds per later token) and
        ``total`` seconds.
    """
    times: dict[str, list[dict[str, float]]] = {name: [] for name in runs}
    for i in track(range(rounds + 1), description="rounds", console=Console(stderr=True)):
        for name, run in runs.items():
            stamps = [_now(model)]
            run(tokens if i else 4, lambda stamps=stamps: stamps.append(_now(model)))  # type: ignore[misc]
            if i:
                steps = [b - a for a, b in itertools.pairwise(stamps)]
                row = {"prefill": steps[0], "token": statistics.median(steps[1:])}
                times[name].append({**row, "total": stamps[-1] - stamps[0]})
    return {
        name: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for name, rows in times.items()
    }


def _now(model: Any) -> float:
    _synchronise(model)
    return time.perf_counter()


def variants(model: Any, inputs: dict[str, torch.Tensor], methods: list[Method]) -> dict[str, Run]:
    """Plain, every method, and the papers' loop where we have it."""
    from mmlm import attach

    def run(*attached: Method) -> Run:
        def generate(n: int, tick: Callable[[], None]) -> Any:
            def stop(ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
                tick()
                return ids.new_zeros(ids.shape[0], dtype=bool)

            with attach(model, *attached):
                return model.generate(
                    **inputs, max_new_tokens=n, do_sample=False, stopping_criteria=[stop]
                )

        return generate

    runs: dict[str, Run] = {"plain": run()}
    for method in methods:
        runs[method.label] = run(method)
        if type(method).__name__ == "VCD":
            name = f"{method.label}, papers' loop"
            runs[name] = lambda n, tick, m=method: naive_contrast(model, inputs, m, n, tick)  # type: ignore[misc]
    return runs


def show(results: dict[int, dict[str, dict[str, float]]], console: Console) -> None:
    """Prints one table per batch size, ratios to plain and, for a contrast, to the papers' loop."""
    for batch, rows in results.items():
        table = Table(title=f"batch {batch}, relative to plain")
        for column in ("variant", "prefill", "per token", "total", "total vs papers' loop"):
            table.add_column(column, justify="left" if column == "variant" else "right")
        plain = rows["plain"]
        for name, row in rows.items():
            loop = rows.get(f"{name}, papers' loop")
            table.add_row(
                name,
                *(f"{row[k] / plain[k]:.3f}" for k in ("prefill", "token", "total")),
                f"{row['total'] / loop['total']:.3f}" if loop else "",
            )
        console.print(table)


def main(argv: list[str] | None = None) -> int:
    """Measures and prints; see the module's docstring."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__)
    parser.add_argument("--method", action="append", help="text form; default: every method")
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--output", help="write the figures to this JSON file")
    options = parser.parse_args(argv)

    import torch

    import mmlm

    texts = options.method or mmlm.method_names()
    methods = [mmlm.parse_method(text) for text in texts]
    model = build_model(options.layers, options.width, options.dtype, options.device)
    results = {}
    for batch in options.batch:
        runs = variants(model, make_inputs(model, batch), methods)
        results[batch] = measure(runs, model, options.tokens, options.rounds)
    show(results, Console())
    if options.output:
        setting = {
            **{k: v for k, v in vars(options).items() if k != "output"},
            "methods": [m.text for m in methods],
            "image_tokens": IMAGE_TOKENS,
            "torch": torch.__version__,
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
        }
        with open(options.output, "w", encoding="utf-8") as file:
            json.dump({"setting": setting, "results": results}, file, indent=1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
