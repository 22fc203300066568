"""What DARA changes on the tasks of `mmlm data micl`: accuracies, and where attention goes.

    python tools/teach_dara_reader.py --output runs/dara/reader
    python tools/measure_dara.py --folder runs/dara

Makes the episodes, trains the factors and the adapter (`train/world/dara_reader` and
`dara_reader_lora`), answers the same queries without demonstrations, without their pictures, with
wrong answers, and with all of them, plain and with either, and writes docs/results/dara_micl.json.
Resumable: what is there is kept.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import mmlm  # noqa: F401  (first: it installs the torchvision guard)  # isort: skip
import numpy as np
import torch
from last_row import LastRow, shares

from benchmarks.micl import right
from benchmarks.stats import bootstrap_interval, paired_bootstrap
from mmlm import DARA, attach, measured
from mmlm.inputs import load_image, message, prepare
from mmlm.model.checkpoint import load

TASKS = ("outlier", "count", "character")
CONDITIONS = ("zero_shot", "no_images", "shuffled_labels", "full")
ARMS = ("plain", "DARA", "LoRA")


def run(*command: str) -> None:
    """A command of this project, in a process of its own."""
    print("+", " ".join(command), flush=True)
    subprocess.run([sys.executable, "-m", *command], check=True)


def make(folder: Path, n: int) -> None:
    """Episodes: some of the support split to learn from, the same queries under every condition."""
    tasks = [word for task in TASKS for word in ("--task", task)]
    support = folder / "support"
    if not (support / "episodes.jsonl").exists():
        run("mmlm", "data", "micl", "--output", str(support), "--split", "support", *tasks,
            "--n", str(n))  # fmt: skip
    for condition in CONDITIONS:
        if not (folder / condition / "episodes.jsonl").exists():
            run("mmlm", "data", "micl", "--output", str(folder / condition), *tasks,
                "--condition", condition, "--n", str(n), "--seed", "1")  # fmt: skip


def train(folder: Path) -> None:
    """Factors and adapters; a finished training is left as it is."""
    for config, name in (("dara_reader", "factors"), ("dara_reader_lora", "adapters")):
        given = [
            "--output", str(folder / name),
            "--recipe.init_args.model.name", str(folder / "reader" / "model"),
            "--recipe.init_args.data.files", json.dumps([str(folder / "support/episodes.jsonl")]),
        ]  # fmt: skip
        run("training", "--config", f"train/world/{config}", *given)


def prompts(folder: Path, condition: str, task: str) -> list[dict[str, Any]]:
    """The episodes of a task under a condition."""
    lines = (folder / condition / "episodes.jsonl").read_text().splitlines()
    found = [json.loads(line) for line in lines]
    return [one for one in found if one["task"] == task]


def batches(processor: Any, folder: Path, episodes: list[dict[str, Any]], size: int = 25) -> Any:
    """Inputs of the model, and the episodes they are made of."""
    for first in range(0, len(episodes), size):
        part = episodes[first : first + size]
        asked = [[message("user", one["prompt"], len(one["images"]), marked=True)] for one in part]
        pictures = [[load_image(folder / path) for path in one["images"]] for one in part]
        yield prepare(processor, asked, pictures), part


def with_arm(folder: Path, arm: str, task: str) -> tuple[Any, Any, Any]:
    """The model of an arm, its processor, and the methods with which it answers."""
    model, processor = load(str(folder / "reader" / "model"))
    if arm == "LoRA":
        from peft import PeftModel

        about = json.loads((folder / "adapters" / f"{task}.json").read_text())
        path = folder / "adapters" / about["folder"] / "adapter"
        return PeftModel.from_pretrained(model, path).eval(), processor, ()
    if arm == "plain":
        return model, processor, ()
    method = DARA(weights_file=str(folder / "factors" / f"{task}.safetensors"), align="query_last")
    return model, processor, (method,)


@torch.no_grad()
def answer(folder: Path, arm: str, condition: str, task: str) -> list[int]:
    """Whether each query is answered rightly: 1 or 0."""
    model, processor, methods = with_arm(folder, arm, task)
    hits = []
    with attach(model, *methods):
        for inputs, part in batches(
            processor, folder / condition, prompts(folder, condition, task)
        ):
            ids = model.generate(**inputs, max_new_tokens=3, do_sample=False)
            new = ids[:, inputs["input_ids"].shape[1] :]
            said = processor.tokenizer.batch_decode(new, skip_special_tokens=True)
            hits += [
                int(right(text, one["answer"], one["compare"]))
                for text, one in zip(said, part, strict=True)
            ]
    return hits


@torch.no_grad()
def share_on_images(folder: Path, arm: str, task: str) -> dict[str, float]:
    """Share of the attention of the last position on images, in layer 0 and over all layers."""
    model, processor, methods = with_arm(folder, arm, task)
    records: list[dict[str, Any]] = []
    with attach(model, *methods, LastRow()):
        for inputs, _ in batches(processor, folder / "full", prompts(folder, "full", task)[:100]):
            model(**inputs)
            records += measured(model)
    return {where: sum(by_image) for where, by_image in shares(records).items()}


def mean(sums: np.ndarray) -> np.ndarray:
    """Right answers of those asked."""
    return sums[..., 0] / sums[..., 1]


def counts(hits: list[int]) -> np.ndarray:
    """Right and asked, episode by episode."""
    return np.stack([np.array(hits, dtype=float), np.ones(len(hits))], axis=1)


def accuracy(hits: list[int]) -> dict[str, Any]:
    """Accuracy with its interval."""
    interval = bootstrap_interval(counts(hits), mean)
    assert interval is not None
    return {"accuracy": sum(hits) / len(hits), "interval": [interval.low, interval.high]}


def against(plain: list[int], hits: list[int]) -> dict[str, Any]:
    """The paired difference to the plain model."""
    found = paired_bootstrap(counts(plain), counts(hits), mean)
    assert found.interval is not None
    return {"change": found.value, "interval": [found.interval.low, found.interval.high]}


def main() -> None:
    """See above."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("runs/dara"))
    parser.add_argument("--episodes", type=int, default=200, help="per task")
    parser.add_argument("--output", type=Path, default=Path("docs/results/dara_micl.json"))
    given = parser.parse_args()
    folder = given.folder
    make(folder, given.episodes)
    train(folder)
    stored = folder / "hits.json"
    hits: dict[str, list[int]] = json.loads(stored.read_text()) if stored.exists() else {}
    for task in TASKS:
        for arm in ARMS:
            for condition in CONDITIONS if arm == "plain" else ("zero_shot", "full"):
                key = f"{arm}/{condition}/{task}"
                if key not in hits:
                    hits[key] = answer(folder, arm, condition, task)
                    stored.write_text(json.dumps(hits))
                    print(key, sum(hits[key]) / len(hits[key]), flush=True)
    result: dict[str, Any] = {
        "episodes": given.episodes,
        "reader": json.loads((folder / "reader" / "log.json").read_text())[-1],
        "accuracy": {key: accuracy(found) for key, found in hits.items()},
        "against_plain": {
            f"{arm}/{task}": against(hits[f"plain/full/{task}"], hits[f"{arm}/full/{task}"])
            for arm in ARMS[1:]
            for task in TASKS
        },
        "attention": {
            f"{arm}/{task}": share_on_images(folder, arm, task) for arm in ARMS for task in TASKS
        },
        "learned": {
            f"{arm}/{task}": json.loads((folder / name / f"{task}.json").read_text())
            for arm, name in (("DARA", "factors"), ("LoRA", "adapters"))
            for task in TASKS
        },
    }
    for one in result["learned"].values():
        one.pop("base_model")
    given.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
