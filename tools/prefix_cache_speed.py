"""Measures the prefix-cached sentence generator against loops that read every prompt anew.

    OMP_NUM_THREADS=1 python tools/prefix_cache_speed.py      writes docs/results/prefix_cache.json

The whole sampling loop of SENTINEL runs: n samples, the first sentence goes into the context, and
again. Three generators draw the same samples, which is asserted, so the ratio of their times is
also that of their pairs per second:

    cached   HFGenerator
    fresh    HFGenerator(keep=False): a fresh prompt for every step, read once for all samples
    naive    NaiveGenerator: a fresh prompt for every step through model.generate

They take turns in one process. Times are CPU seconds of the process: the machine may be shared.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

import mmlm
from benchmarks.speed_model import Shape, build_model, build_processor
from data_tools.generators import SentenceGenerator, SentenceRequest
from data_tools.generators.huggingface import HFGenerator
from data_tools.generators.naive import NaiveGenerator
from data_tools.pictures import Picture
from data_tools.world.painting import render
from data_tools.world.scenes import WorldConfig, scene

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "results" / "prefix_cache.json"
N, TEMPERATURE = 10, 0.7
SENTENCE = 25
"""One word in so many ends a sentence of the random model: its sentences are about as long."""
Texts = dict[tuple[str, int], list[str]]


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    torch.set_num_threads(1)
    figures = {
        "setting": {
            "n": N,
            "temperature": TEMPERATURE,
            "threads": torch.get_num_threads(),
            "rounds": options.rounds,
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "seconds": "CPU seconds of one process on a shared machine, medians over rounds",
        },
        "embedded": _embedded(options.rounds),
        "small": _small(options.rounds),
    }
    options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def _embedded(rounds: int) -> dict[str, Any]:
    """The embedded model on world scenes."""
    model, processor = mmlm.load("embedded")
    images = [render(scene(WorldConfig(), 7, i, "val")).image for i in range(32)]
    pictures = [_picture(i, image) for i, image in enumerate(images)]
    question = "describe the image ."
    found = _compare(model, processor, pictures[:8], question, 6, rounds)
    at_once = {}
    for count in (1, 4, 8, 16, 32):
        times = []
        for _ in range(rounds):
            generator = HFGenerator(model, processor, pictures_at_once=count)
            seconds, texts = _loop(generator, pictures, question, 6, count)
            times.append(seconds)
        seconds = statistics.median(times)
        at_once[count] = {
            "images_per_second": round(len(pictures) / seconds, 2),
            "steps_per_second": round(len(texts) / seconds, 2),
        }
    return {**found, "cached_by_pictures_at_once": at_once}


def _small(rounds: int) -> dict[str, Any]:
    """A random model whose pictures take 576 tokens, as LLaVA-1.5's do."""
    shape = Shape()
    processor = _with_sentences(build_processor(shape))
    model = build_model(shape)
    numbers = np.random.default_rng(0)
    size = (shape.side, shape.side, 3)
    pictures = [_picture(i, numbers.integers(0, 256, size, dtype=np.uint8)) for i in range(2)]
    words = " ".join(f"w{i}" for i in range(101, 117))
    found = _compare(model, processor, pictures, words, 3, max(rounds // 3, 1))
    return {
        "image_tokens": shape.image_tokens,
        "layers": shape.layers,
        "width": shape.width,
    } | found


def _compare(
    model: Any,
    processor: Any,
    pictures: Sequence[Picture],
    question: str,
    steps: int,
    rounds: int,
) -> dict[str, Any]:
    """All generators in turn, the same outputs asserted."""
    generators: Mapping[str, SentenceGenerator] = {
        "cached": HFGenerator(model, processor, max_new_tokens=64),
        "fresh": HFGenerator(model, processor, max_new_tokens=64, keep=False),
        "naive": NaiveGenerator(model, processor, max_new_tokens=64),
    }
    times: dict[str, list[float]] = {name: [] for name in generators}
    _loop(generators["cached"], pictures[:1], question, 2, 1)
    for _ in range(rounds):
        outputs: dict[str, Texts] = {}
        for name, generator in generators.items():
            seconds, outputs[name] = _loop(generator, pictures, question, steps, len(pictures))
            times[name].append(seconds)
        if not outputs["cached"] == outputs["fresh"] == outputs["naive"]:
            raise SystemExit("The generators drew different samples.")
    median = {name: statistics.median(own) for name, own in times.items()}
    taken = len(outputs["cached"])
    return {
        "pictures": len(pictures),
        "steps": taken,
        "same_samples": True,
        "seconds": {name: round(value, 3) for name, value in median.items()},
        "steps_per_second": {name: round(taken / value, 3) for name, value in median.items()},
        "times_faster_than_fresh": round(median["fresh"] / median["cached"], 2),
        "times_faster_than_naive": round(median["naive"] / median["cached"], 2),
    }


def _loop(
    generator: SentenceGenerator,
    pictures: Sequence[Picture],
    question: str,
    steps: int,
    at_once: int,
) -> tuple[float, Texts]:
    """The sampling loop of SENTINEL; CPU seconds, and what was sampled."""
    texts: Texts = {}
    start = time.process_time()
    for first in range(0, len(pictures), at_once):
        live = list(pictures[first : first + at_once])
        contexts = {picture.id: "" for picture in live}
        for step in range(steps):
            requests = [
                SentenceRequest(p, question, contexts[p.id], 100 * int(p.id) + step) for p in live
            ]
            going = []
            results = generator.sample_sentences(requests, N, TEMPERATURE)
            for picture, samples in zip(live, results, strict=True):
                if isinstance(samples, Exception):
                    raise samples
                own = texts[picture.id, step] = [sample.text for sample in samples]
                said = [text for text in own if text]
                if 2 * len(said) >= N:
                    contexts[picture.id] = f"{contexts[picture.id]} {said[0]}".strip()
                    going.append(picture)
            generator.forget([picture for picture in live if picture not in going])
            live = going
            if not live:
                break
        generator.forget(live)
    return time.process_time() - start, texts


def _picture(number: int, pixels: np.ndarray[Any, Any]) -> Picture:
    return Picture(str(number), Path(f"{number}.png"), Image.fromarray(pixels), f"{number}")


def _with_sentences(processor: Any) -> Any:
    """Gives a vocabulary of words some that end sentences."""
    old = processor.tokenizer
    state = json.loads(old.backend_tokenizer.to_str())
    state["model"]["vocab"] = {
        f"{word}x." if word.startswith("w") and number % SENTENCE == 0 else word: number
        for word, number in state["model"]["vocab"].items()
    }
    processor.tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        padding_side="left",
        extra_special_tokens={"image_token": "<image>"},
    )
    return processor


if __name__ == "__main__":
    main()
