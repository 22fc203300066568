"""From our settings to the arguments of transformers' Trainer and its kin.

One place knows both vocabularies. What a library decides well by itself is left to it.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import configs
from mmlm.errors import InputError
from training.launch import world
from training.settings import Optimisation

if TYPE_CHECKING:
    from training.config import Run

__all__ = ["deepspeed_file", "trainer_arguments"]

T = TypeVar("T")
_FOLDER = Path(configs.__file__).parent / "deepspeed"


def _order(given: Optimisation) -> str:
    if given.group_by_length:
        return "group_by_length"
    return "random" if given.shuffle else "sequential"


def deepspeed_file(name: str) -> Path:
    """DeepSpeed's configuration: the path of a JSON file, or the name of one that ships.

    Raises:
        InputError: there is neither; lists what ships.
    """
    for path in (Path(name), _FOLDER / f"{name.removesuffix('.json')}.json"):
        if path.is_file():
            return path
    known = ", ".join(sorted(path.stem for path in _FOLDER.glob("*.json")))
    raise InputError(
        f"There is no DeepSpeed configuration {name!r}.", advice=f"Give a file, or one of {known}."
    )


def trainer_arguments(
    kind: type[T],
    run: Run,
    optimisation: Optimisation,
    *,
    deepspeed: str | None,
    report_to: Sequence[str] = (),
    log_every: int = 10,
    more: dict[str, Any] | None = None,
) -> T:
    """Builds `transformers.TrainingArguments` or a class derived from it.

    Args:
        kind: the class.
        run: output, seed, precision.
        optimisation: see there.
        deepspeed: a shipped name, a file, or None to train without DeepSpeed.
        report_to: trackers, by the library's names.
        log_every: optimiser steps between two log entries.
        more: further arguments of the class, which win over those made here.

    Raises:
        InputError: the batch cannot be shared by the processes, or no such DeepSpeed file.
    """
    import torch

    given = optimisation
    try:
        accumulation = given.accumulation(world())
    except ValueError as error:
        raise InputError(str(error), advice="Choose another batch_size or rows_per_pass.") from None
    values: dict[str, Any] = {
        "output_dir": str(run.output),
        "seed": run.seed,
        "use_cpu": not torch.cuda.is_available(),
        "bf16": run.settings.precision == "bf16",
        "learning_rate": given.learning_rate,
        "lr_scheduler_type": given.schedule,
        "warmup_steps": given.warmup,  # below 1 the library reads it as a share of all steps
        "num_train_epochs": given.epochs,
        "max_steps": -1 if given.steps is None else given.steps,
        "per_device_train_batch_size": given.rows_per_pass,
        "per_device_eval_batch_size": given.rows_per_pass,
        "gradient_accumulation_steps": accumulation,
        "weight_decay": given.weight_decay,
        "adam_beta1": given.betas[0],
        "adam_beta2": given.betas[1],
        "max_grad_norm": given.max_grad_norm,
        "activation_checkpointing": given.activation_checkpointing,
        "remove_unused_columns": False,
        "train_sampling_strategy": _order(given),
        "logging_steps": log_every,
        "logging_nan_inf_filter": False,
        "report_to": list(report_to) or "none",
        "disable_tqdm": True,  # ours stands in training.tracking
        # Nothing that learns is ever left out of a pass: what is not used is frozen.
        "ddp_find_unused_parameters": False,
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    if deepspeed is not None:
        values["deepspeed"] = json.loads(deepspeed_file(deepspeed).read_text(encoding="utf-8"))
    return kind(**values | (more or {}))
