"""Measures preference training beside TRL's own: the trainer's overhead and the two fast paths.

    OMP_NUM_THREADS=1 python tools/training_speed.py       writes docs/results/training_speed.json

A random LLaVA is trained on C-DPO's shape: one picture of 576 tokens, a question and a begun answer
before answers of 30 tokens, LoRA on the decoder, reference by adapters off. Every variant gets a
fresh trainer on the same weights, and they take turns in one process:

    trl             TRL's DPOTrainer and DataCollatorForVisionPreference; the begun answer is in
                    the prompt's text
    ours            VLPreferenceTrainer and VisionPreferenceCollator
    features_once   ours, each picture encoded once
    shared_prefix   ours, prompts read once for both answers
    both            ours, with both

A step lasts from the end of one optimizer step to the end of the next, pictures read from the disk
included. The first step of a trainer, in which shared_prefix is compared with plain rows, is left
out. CPU seconds of the process, because the machine may be shared; wall seconds beside them.
"""

from __future__ import annotations

import argparse
import copy
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mmlm  # noqa: F401  (first: it makes torchvision importable beside any torch)  # isort: skip
import numpy as np
import torch
import transformers
import trl
from datasets import Dataset, Image, List
from PIL import Image as Picture
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    TrainerCallback,
)
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

from benchmarks.speed_model import Shape, build_processor
from training.preference.collator import VisionPreferenceCollator
from training.preference.rows import PreferenceRow
from training.preference.trainer import VLPreferenceTrainer

ROOT = Path(__file__).parents[1]
OUTPUT = ROOT / "docs" / "results" / "training_speed.json"
LAYERS, WIDTH, MLP = 6, 384, 1536
TOWER = (12, 64, 2)
"""Layers, width, heads: about 8 % of the decoder's work, as CLIP-L stands to a 7B decoder."""
SIDE, PATCH, WORDS = 336, 14, 500
"""A small vocabulary: on a CPU TRL scores every position, on a GPU only those of the answers."""
VARIANTS = {
    "trl": None,
    "ours": (),
    "features_once": ("features_once",),
    "shared_prefix": ("shared_prefix",),
    "both": ("features_once", "shared_prefix"),
}


def main() -> None:
    """Measures and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=4, help="of a round; the first is left out")
    parser.add_argument("--pairs", type=int, default=1, help="of a batch")
    parser.add_argument("--output", type=Path, default=OUTPUT)
    options = parser.parse_args()
    if options.steps < 2:
        parser.error("--steps must be at least 2: the first step of a round is left out")
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        figures = _measure(options, Path(folder))
    options.output.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(figures, indent=2))


def _measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    processor = build_processor(Shape(side=SIDE), words=WORDS)
    rows = _rows(folder, options.pairs * options.steps)
    model = _model(processor.tokenizer)
    tokens = _same_batches(processor, rows[: options.pairs])
    seconds: dict[str, list[list[float]]] = {name: [] for name in VARIANTS}
    losses = {}
    for _ in range(options.rounds):
        for name in VARIANTS:
            trainer = _trainer(name, copy.deepcopy(model), processor, rows, options, folder)
            clock = _Clock()
            trainer.add_callback(clock)
            trainer.train()
            seconds[name] += clock.steps()
            losses[name] = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    cpu = {name: statistics.median(x[0] for x in found) for name, found in seconds.items()}
    wall = {name: statistics.median(x[1] for x in found) for name, found in seconds.items()}
    worst = max(
        abs(a - b) for found in losses.values() for a, b in zip(found, losses["trl"], strict=True)
    )
    return {
        "setting": {
            "decoder": {"layers": LAYERS, "width": WIDTH, "mlp": MLP, "vocabulary": WORDS},
            "tower": dict(zip(("layers", "width", "heads"), TOWER, strict=True)),
            **tokens,
            "pairs_per_step": options.pairs,
            "lora": 8,
            "dtype": "float32",
            "rounds": options.rounds,
            "steps_per_round": options.steps - 1,
            "threads": 1,
            "machine": platform.processor() or platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
            "seconds": "per step, medians; CPU of one process on a shared machine, and wall",
        },
        "cpu_seconds": {name: round(x, 3) for name, x in cpu.items()},
        "wall_seconds": {name: round(x, 3) for name, x in wall.items()},
        "all_cpu_seconds": {
            name: [round(x[0], 3) for x in found] for name, found in seconds.items()
        },
        "overhead": round(cpu["ours"] / cpu["trl"] - 1, 4),
        "faster_than_trl": {name: round(cpu["trl"] / x, 2) for name, x in cpu.items()},
        "largest_difference_of_losses": worst,
    }


class _Clock(TrainerCallback):
    """CPU and wall time at the end of every step."""

    def __init__(self) -> None:
        self._marks: list[tuple[float, float]] = []

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        """One optimizer step is over."""
        self._marks.append((time.process_time(), time.perf_counter()))

    def steps(self) -> list[list[float]]:
        """Seconds of each step but the first: [CPU, wall]."""
        pairs = zip(self._marks, self._marks[1:], strict=False)
        return [[b - a for a, b in zip(*pair, strict=True)] for pair in pairs]


def _trainer(
    name: str,
    model: Any,
    processor: Any,
    rows: list[PreferenceRow],
    options: argparse.Namespace,
    folder: Path,
) -> Any:
    from peft import LoraConfig

    settings = DPOConfig(
        str(folder / "run"),
        use_cpu=True,
        bf16=False,
        activation_checkpointing=False,
        max_length=None,
        max_steps=options.steps,
        per_device_train_batch_size=options.pairs,
        learning_rate=1e-4,
        logging_steps=1,
        logging_strategy="steps",
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=0,
    )
    lora = LoraConfig(r=8, target_modules=r".*language_model.*\.(q|k|v|o|gate|up|down)_proj")
    common = {"args": settings, "processing_class": processor, "peft_config": lora}
    fast = VARIANTS[name]
    if fast is not None:
        return VLPreferenceTrainer(model, train_dataset=rows, fast=fast, **common)
    data = Dataset.from_list([_for_trl(processor, row) for row in rows])
    data = data.cast_column("images", List(Image()))
    return DPOTrainer(model, train_dataset=data, **common)


def _for_trl(processor: Any, row: PreferenceRow) -> dict[str, Any]:
    """A row in the only form in which TRL can express a begun answer: raw text."""
    prompt = processor.apply_chat_template(
        list(row.prompt), add_generation_prompt=True, tokenize=False
    )
    return {
        "images": list(row.images),
        "prompt": f"{prompt} {row.context}",
        "chosen": f" {row.chosen} </s>",
        "rejected": f" {row.rejected} </s>",
    }


def _same_batches(processor: Any, rows: list[PreferenceRow]) -> dict[str, int]:
    """Checks that both collators make the same batch, and counts its tokens."""
    ours = VisionPreferenceCollator(processor)(rows)
    theirs = [_for_trl(processor, row) for row in rows]
    for row in theirs:
        row["images"] = [Picture.open(path) for path in row["images"]]
    other = DataCollatorForVisionPreference(processor)(theirs)
    for name in ("input_ids", "attention_mask", "completion_mask", "pixel_values"):
        if not torch.equal(ours[name], other[name]):
            raise SystemExit(f"The two collators disagree about {name}.")
    scored = ours["completion_mask"]
    return {
        "prefix_tokens": int(scored[0].argmax()),
        "image_tokens": int((ours["input_ids"][0] == processor.image_token_id).sum()),
        "answer_tokens": int(scored[0].sum()),
    }


def _rows(folder: Path, count: int) -> list[PreferenceRow]:
    draw = np.random.default_rng(0)

    def words(n: int) -> str:
        return " ".join(f"w{i}" for i in draw.integers(10, WORDS, n))

    rows = []
    for number in range(count):
        path = folder / f"{number}.png"
        Picture.fromarray(draw.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(path)
        content = [{"type": "image"}, {"type": "text", "text": words(12)}]
        rows.append(
            PreferenceRow(
                id=str(number),
                images=(str(path),),
                prompt=({"role": "user", "content": content},),
                chosen=words(29),
                rejected=words(29),
                context=words(12),
            )
        )
    return rows


def _model(tokenizer: Any) -> LlavaForConditionalGeneration:
    layers, width, heads = TOWER
    vision = CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        image_size=SIDE,
        patch_size=PATCH,
    )
    text = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=MLP,
        num_hidden_layers=LAYERS,
        num_attention_heads=WIDTH // 64,
        num_key_value_heads=WIDTH // 64,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.manual_seed(0)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_id=tokenizer.image_token_id)
    )


if __name__ == "__main__":
    main()
