"""A small preference training on the disk: a tiny model, pictures, pairs, and its configuration."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import tiny
import yaml
from PIL import Image

from mmlm.model.checkpoint import save

ROOT = Path(__file__).parents[2]
ENVIRONMENT = {
    "DS_ACCELERATOR": "cpu",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
}


def write_pairs(folder, count=16, texts_only=()):
    """Pairs of sentences about noise; every second one has a context."""
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng(0)
    lines = []
    for number in range(count):
        picture = folder / f"{number}.png"
        Image.fromarray(draw.integers(0, 256, (56, 56, 3), dtype=np.uint8)).save(picture)
        sentences = draw.choice(["a cat sits .", "a dog is near a train .", "people watch ."], 2)
        lines.append(
            {
                "id": f"p{number}",
                "images": [] if number in texts_only else [picture.name],
                "question": "describe the image in detail .",
                "context": "the quick brown fox ." if number % 2 else "",
                "chosen": f"{sentences[0]} a {number}",
                "rejected": f"{sentences[1]} the {number} the",
                "is_final": number % 4 == 0,
            }
        )
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def write_model(folder, family="llava"):
    model, processor = tiny.build(family)
    save(model, processor, folder)
    return folder


def configuration(folder, output, *, steps=6, every=2, **values):
    """The configuration file of a training of `folder/model` on `folder/pairs.jsonl`."""
    arguments = {
        "model": {"name": str(folder / "model"), "lora": {"r": 4, "alpha": 8}},
        "data": {"files": [str(folder / "pairs.jsonl")]},
        "optimisation": {
            "learning_rate": 1e-2,
            "steps": steps,
            "batch_size": 4,
            "rows_per_pass": 2,
        },
        "saving": {"every": every},
        "tracking": {"log_every": 1, "progress": "never"},
        "export": ["merged"],
        **values,
    }
    given = {
        "output": str(output),
        "recipe": {"class_path": "training.preference.recipe.Preference", "init_args": arguments},
        "run": {"precision": "no"},
    }
    path = output.with_name(f"{output.name}.yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(given))
    return path


def logged(output, name="loss"):
    """A logged value by step."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    return {line["step"]: line[name] for line in lines if name in line}
