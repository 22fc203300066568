"""Memory and time of MIA-DPO's scoring beside the authors' way, in one run.

    python tools/mia_scoring_memory.py --output docs/results/mia_scoring.json

A prompt of about 3,000 tokens (five pictures of 576 tokens) with a response of 100 tokens, on
random models of 8 heads and 4 or 8 layers. *Eager* is what the authors' code does
(Liuziyu77/MIA-DPO, commit a85c51a): eager attention that returns the weights of all layers, of
which the rows of one are read; here in its cheaper form, in one teacher-forced pass instead of
token by token. *Scored* is `data_tools.mia.forced.force`. Ratios of both must agree.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.memory import peak_bytes
from benchmarks.speed import machine
from benchmarks.speed_model import Shape, build_model, build_processor
from data_tools.mia.attention import image_sums, key_attention, shares
from data_tools.mia.forced import force, with_responses
from mmlm.inputs import message, prepare
from mmlm.probes.image_attention import central_layer

PICTURES = 5
RESPONSE = 100
WORDS = 110
"""Words of the question; with them the prompt has about 3,000 tokens."""


def case(layers: int, width: int = 512) -> tuple[Any, Any, dict[str, Any]]:
    """A random model, its processor and the inputs of the prompt.

    Args:
        layers: Decoder layers.
        width: Width of the decoder, of which each of 8 heads gets an eighth.
    """
    from PIL import Image

    shape = Shape(layers, width, 8, 4 * width, tower=(1, 64, 1))
    side = shape.side
    model, processor = build_model(shape), build_processor(shape)
    marks = " ".join(f"w{i + 10} <image {i + 1}>" for i in range(PICTURES))
    text = f"{marks} {' '.join(f'w{i + 100}' for i in range(WORDS))}"
    pictures = [Image.new("RGB", (side, side), (40 * i, 90, 200 - 40 * i)) for i in range(PICTURES)]
    conversation = [message("user", text, PICTURES, marked=True)]
    return model, processor, prepare(processor, [conversation], [pictures])


def eager(model: Any, inputs: dict[str, Any], response: Sequence[int]) -> list[float] | None:
    """Ratios from the attention weights of all layers, as eager attention returns them."""
    grown = with_responses(inputs, [response], pad=0)
    length = inputs["input_ids"].shape[1]
    model.set_attn_implementation("eager")
    try:
        with torch.inference_mode():
            output = model(
                **grown, output_attentions=True, use_cache=False, logits_to_keep=len(response)
            )
        weights = output.attentions[central_layer(len(output.attentions))]
    finally:
        model.set_attn_implementation("sdpa")
    rows = weights[0, :, length:]
    images = _positions(model, inputs["input_ids"][0])
    return shares(image_sums(key_attention([rows], length), images))


def _positions(model: Any, ids: torch.Tensor) -> list[torch.Tensor]:
    where = (ids == model.config.image_token_id).nonzero()[:, 0]
    return list(where.chunk(PICTURES))


def ways(layers: int, width: int = 512) -> dict[str, Callable[[], list[float] | None]]:
    """The ways to the ratios, by name; ``early`` ends behind the layer, without probabilities."""
    model, processor, inputs = case(layers, width)
    generator = torch.Generator().manual_seed(0)
    response = torch.randint(10, 30_000, (RESPONSE,), generator=generator).tolist()

    def scored(probabilities: bool) -> list[float] | None:
        (one,) = force(model, processor, inputs, [response], probabilities=probabilities)
        return shares(one.attention["images"])

    return {
        "eager": lambda: eager(model, inputs, response),
        "scored": lambda: scored(True),
        "early": lambda: scored(False),
    }


def measure(layers: int, repeats: int) -> dict[str, Any]:
    """Peak bytes and seconds of each way, taken in turns."""
    found = ways(layers)
    ratios = {name: run() for name, run in found.items()}
    largest = max(
        abs(a - b)
        for name in ("scored", "early")
        for a, b in zip(ratios[name] or (), ratios["eager"] or (), strict=True)
    )
    peaks = {name: peak_bytes(run, "cpu") for name, run in found.items()}
    seconds: dict[str, list[float]] = {name: [] for name in found}
    for _ in range(repeats):
        for name, run in found.items():
            start = time.perf_counter()
            run()
            seconds[name].append(round(time.perf_counter() - start, 3))
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    return {
        "layers": layers,
        "heads": 8,
        "prompt_tokens": int(case(layers)[2]["input_ids"].shape[1]),
        "response_tokens": RESPONSE,
        "largest_difference_of_ratios": largest,
        "peak_bytes": peaks,
        "seconds": seconds,
        "memory_of_eager": {n: round(peaks[n] / peaks["eager"], 4) for n in ("scored", "early")},
        "time_of_eager": {n: round(medians[n] / medians["eager"], 4) for n in ("scored", "early")},
    }


def main(argv: list[str] | None = None) -> int:
    """Measures, prints and stores."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--output", type=Path, help="write the figures to this JSON file")
    options = parser.parse_args(argv)
    rows = [measure(layers, options.repeats) for layers in options.layers]
    for row in rows:
        print(
            f"{row['layers']} layers, {row['prompt_tokens']} + {RESPONSE} tokens: memory "
            f"{row['memory_of_eager']}, time {row['time_of_eager']} of eager"
        )
    if options.output:
        record = {
            "command": "python tools/mia_scoring_memory.py",
            "machine": machine("cpu"),
            "threads": torch.get_num_threads(),
            "note": "the machine was shared with other work; the ways were run in turns",
            "rows": rows,
        }
        options.output.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
