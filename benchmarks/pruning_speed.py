"""Speed of a prompt's first pass when patches leave the vision tower (FlowCut), pictures included.

    python -m benchmarks.pruning_speed                      on the CPU
    python -m benchmarks.pruning_speed --device cuda --preset 7b --dtype bfloat16

Two prompts: one picture, 576 visual tokens cut to 64 (LLaVA-1.5); and five, 2880 cut to 160 in two
stages (the tiles of LLaVA-NeXT: 80 of each in the tower, 160 of all behind the decoder's second
layer). Plain and pruned passes take turns, and the median of the rounds' ratios is compared with
what operations predict from the lengths that really ran. At least half of the predicted ratio is
asked for; on a GPU with a 7B model also a ratio of 3 for the first and 5 for the second. Weights
are random, which changes how fast patches leave (attention is even), not where they end up.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

import mmlm
from benchmarks.speed import write_report
from benchmarks.speed_model import IMAGE, PRESETS, Shape, build_model
from mmlm import FlowCut
from mmlm.engine import flops

__all__ = ["CASES", "Case", "main", "measure", "tower_operations"]

TEXT = 64
"""Text tokens of a prompt; 35 of them before the pictures, as in LLaVA-1.5."""
BEFORE = 35
#: The papers' ratios (tower a quarter as wide, MLP 2.7 times the width) with four decoder layers.
SHAPE = Shape(layers=4, width=512, heads=8, intermediate=1376, tower=(6, 128, 2))


@dataclass(frozen=True)
class Case:
    """A prompt and how it is cut.

    Attributes:
        name: of the row.
        pictures: of the prompt.
        method: what cuts it.
        gpu: ratio that is asked for with a 7B model on a GPU.
    """

    name: str
    pictures: int
    method: FlowCut
    gpu: float


CASES = (
    Case("576 -> 64", 1, FlowCut(target=64), 3.0),
    Case("2880 -> 160", 5, FlowCut(target=80, llm_layer=1, llm_target=160), 5.0),
)


def tower_operations(vision: Any, lengths: Sequence[int], patches: int) -> int:
    """Operations of a CLIP tower over one picture.

    Args:
        vision: its configuration.
        lengths: tokens that run through each block that is run, class token included.
        patches: of the picture.
    """
    width, size = vision.hidden_size, vision.intermediate_size
    total = 2 * patches * vision.num_channels * vision.patch_size**2 * width
    for n in lengths:
        total += 2 * n * (4 * width * width + 2 * width * size) + 4 * n * n * width
    return int(total)


class _Run:
    """One prompt on one model."""

    def __init__(self, model: Any, pictures: int) -> None:
        self.model, self.pictures = model, pictures
        vision = model.config.vision_config
        self.patches = (vision.image_size // vision.patch_size) ** 2
        self.length = TEXT + pictures * self.patches
        ids = torch.full((1, self.length), 7, device=model.device)
        ids[:, BEFORE : BEFORE + pictures * self.patches] = IMAGE
        side = vision.image_size
        generator = torch.Generator().manual_seed(0)
        pixels = torch.randn(pictures, 3, side, side, generator=generator)
        self.inputs = {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "pixel_values": pixels.to(model.device, model.dtype),
        }

    @torch.no_grad()
    def seconds(self, methods: Sequence[Any]) -> float:
        """Seconds of one first pass with its pictures, its cache filled."""
        with mmlm.attach(self.model, *methods):
            self._wait()
            began = self._clock()
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
            self._wait()
            return self._clock() - began

    @torch.no_grad()
    def operations(self, methods: Sequence[Any], causal: bool = True) -> int:
        """What the lengths that really run amount to; ``causal`` as in `mmlm.engine.flops`."""
        blocks, layers = self.model.model.vision_tower.encoder.layers, []
        lengths: list[list[int]] = [[] for _ in blocks]
        seen: list[tuple[int, int]] = []
        with mmlm.attach(self.model, *methods):
            hooks = [
                block.self_attn.register_forward_pre_hook(
                    lambda m, a, k, i=i: lengths[i].append(k["hidden_states"].shape[1]),
                    with_kwargs=True,
                )
                for i, block in enumerate(blocks)
            ]
            hooks += [
                layer.self_attn.register_forward_pre_hook(
                    lambda m, a, k: layers.append(k["hidden_states"].shape[1]), with_kwargs=True
                )
                for layer in self.model.model.language_model.layers
            ]
            hooks.append(
                self.model.model.multi_modal_projector.linear_1.register_forward_pre_hook(
                    lambda m, a: seen.append(tuple(a[0].shape[:2]))
                )
            )
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        for hook in hooks:
            hook.remove()
        vision, text = self.model.config.vision_config, self.model.config.text_config
        ran = [own[0] for own in lengths if own]
        tower = self.pictures * tower_operations(vision, ran, self.patches)
        features = seen[0][0] * seen[0][1]
        width = text.hidden_size
        projector = 2 * features * (vision.hidden_size * width + width * width)
        return tower + projector + flops.prefill(text, layers, causal=causal)

    def _clock(self) -> float:
        """Seconds; on a CPU those of this process, which others on the machine do not lengthen."""
        on_gpu = self.model.device.type == "cuda"
        return time.perf_counter() if on_gpu else time.process_time() / torch.get_num_threads()

    def _wait(self) -> None:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize()


def measure(model: Any, cases: Sequence[Case] = CASES, repeats: int = 7) -> list[dict[str, Any]]:
    """Every case: what operations predict, what was measured, whether that is enough.

    Args:
        model: a LLaVA.
        cases: prompts and methods.
        repeats: rounds, each with a plain and a pruned pass; one more round warms up.
    """
    seven_b = model.device.type == "cuda" and model.config.text_config.hidden_size >= 4096
    rows = []
    for case in cases:
        run = _Run(model, case.pictures)
        methods = (case.method,)
        predicted = run.operations(()) / run.operations(methods)
        rounds = [(run.seconds(()), run.seconds(methods)) for _ in range(repeats + 1)][1:]
        faster = statistics.median(a / b for a, b in rounds)
        bar = case.gpu if seven_b else predicted / 2
        plain, pruned = (statistics.median(side) for side in zip(*rounds, strict=True))
        rows.append(
            {
                "case": case.name,
                "method": case.method.text,
                "predicted": round(predicted, 3),
                "faster": round(faster, 3),
                "bar": round(bar, 3),
                "passes": faster >= bar,
                "seconds": {"plain": round(plain, 4), "pruned": round(pruned, 4)},
            }
        )
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """Measures, prints, and writes a JSON file; exit code 1 if a bar is missed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", choices=sorted(PRESETS), help="default: 4 layers of width 512")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", default="benchmarks/results/pruning-cpu.json")
    given = parser.parse_args(arguments)
    torch.set_num_threads(given.threads)
    shape = PRESETS[given.preset] if given.preset else SHAPE
    model = build_model(shape, given.dtype, given.device)
    rows = measure(model, repeats=given.repeats)
    sizes = {"layers": shape.layers, "width": shape.width, "tower": list(shape.tower)}
    facts = {"dtype": given.dtype, "sizes": sizes, "first passes": rows}
    write_report(Path(given.output), given.device, facts)
    for row in rows:
        print(json.dumps(row))
    return 0 if all(row["passes"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
