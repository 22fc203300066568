"""A small data set of pairs with pictures, and TRL's own trainer on a tiny model."""

import warnings

import torch
from datasets import Dataset
from PIL import Image
from tiny import build, picture
from trl import DPOConfig, DPOTrainer
from trl.trainer.dpo_trainer import DataCollatorForVisionPreference

WORDS = "a cat sits on the red couch near two remote controls while people watch a train".split()


def rows(folder, count=6):
    """Pairs as mappings; each has one picture, named by its path."""
    made = []
    for number in range(count):
        path = folder / f"{number}.png"
        picture(number).save(path)
        made.append(
            {
                "id": f"r{number}",
                "images": [str(path)],
                "prompt": [{"role": "user", "content": "what is shown here ?"}],
                "chosen": [{"role": "assistant", "content": " ".join(WORDS[: 3 + number])}],
                "rejected": [{"role": "assistant", "content": " ".join(WORDS[number:])}],
            }
        )
    return made


class PathCollator:
    """TRL's collator for rows whose pictures are paths."""

    def __init__(self, processor):
        self.inner = DataCollatorForVisionPreference(processor)

    def __call__(self, examples):
        opened = [
            {**row, "images": [Image.open(path).convert("RGB") for path in row["images"]]}
            for row in examples
        ]
        return self.inner(opened)


def arguments(output, **options):
    """TRL's arguments for the CPU, in the order of the data unless told otherwise."""
    settings = {
        "per_device_train_batch_size": 2,
        "num_train_epochs": 1,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "bf16": False,
        "use_cpu": True,
        "activation_checkpointing": False,
        "max_length": None,
        "remove_unused_columns": False,
        "report_to": [],
        "train_sampling_strategy": "sequential",
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return DPOConfig(output_dir=str(output), **{**settings, **options})


def trainer(
    data,
    output,
    *,
    family="llava",
    model=None,
    processor=None,
    lora=None,
    ref_model=None,
    callbacks=None,
    eval_dataset=None,
    arguments=arguments,
    **options,
):
    """TRL's trainer of a tiny model; `options` are further arguments."""
    if processor is None:
        built, processor = build(family)
        model = model or built
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return DPOTrainer(
            model=model,
            ref_model=ref_model,
            args=arguments(output, **options) if callable(arguments) else arguments,
            processing_class=processor,
            train_dataset=Dataset.from_list(data),
            eval_dataset=eval_dataset and Dataset.from_list(eval_dataset),
            data_collator=PathCollator(processor),
            peft_config=lora,
            callbacks=callbacks,
        )


def losses(trained):
    """Loss of every step."""
    return torch.tensor([e["loss"] for e in trained.state.log_history if "loss" in e])
