"""A preference training of a few steps in this process, with TRL's own trainer and collator."""

from __future__ import annotations

import json

import numpy as np
import tiny
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from trl import DPOConfig, DPOTrainer

from mmlm.runner import Request

QUESTION = "describe the image in detail ."


def pictures(count=4):
    draw = np.random.default_rng(5)
    return [
        Image.fromarray(draw.integers(0, 256, (56, 56, 3), dtype=np.uint8)) for _ in range(count)
    ]


def rows(count=8):
    def turn(role, text):
        return [{"role": role, "content": text}]

    return Dataset.from_list(
        [
            {
                "images": [picture],
                "prompt": turn("user", QUESTION),
                "chosen": turn("assistant", f"a cat sits {number} ."),
                "rejected": turn("assistant", f"a dog {number} ."),
            }
            for number, picture in enumerate(pictures(count))
        ]
    )


def trainer(folder, steps=4, *, lora=True, lora_dropout=0.0, family="llava", **arguments):
    model, processor = tiny.build(family)
    reference = None if lora else tiny.build(family)[0]
    values = {
        "max_steps": steps,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
        "disable_tqdm": True,
        "report_to": "none",
        "max_length": None,
    }
    targets = r"(?!.*(vision|visual)).*\.(q|v)_proj"
    adapters = LoraConfig(r=4, target_modules=targets, lora_dropout=lora_dropout)
    return DPOTrainer(
        model,
        reference,
        args=DPOConfig(str(folder), **values | arguments),
        train_dataset=rows(),
        eval_dataset=rows(2),
        processing_class=processor,
        peft_config=adapters if lora else None,
    )


class Held:
    """Two pictures with truth; the score counts the answers' words and remembers the answers."""

    def __init__(self, count=2):
        self.images = pictures(count)
        self.seen = []

    def requests(self):
        return [Request(f"h{n}", (image,), QUESTION) for n, image in enumerate(self.images)]

    def score(self, texts):
        self.seen.append(dict(texts))
        return {"words": sum(len(text.split()) for text in texts.values()) / len(texts)}


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]
