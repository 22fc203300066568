"""What every fine-tuning is told in its YAML file: the model, what of it learns, how fast.

Plain dataclasses without a heavy import: `mmlm train --help` reads them too. How they reach the
libraries stands in `training.model` (weights), `training.lora` and `training.arguments`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, TypeAlias

__all__ = ["LoraSettings", "ModelSettings", "Optimisation", "Part"]

Part: TypeAlias = Literal["language", "projector", "tower", "methods"]


@dataclass(frozen=True, kw_only=True)
class LoraSettings:
    """Low-rank adapters on the language model's linear layers, and nowhere else.

    The tower, the projector and the head never get one, whatever the layers are called there.

    Attributes:
        r: rank (SENTINEL, MIA-DPO, LLaVA: 128).
        alpha: scale; an adapter's product is multiplied by alpha / r (all three: 256).
        dropout: on the adapters' input. TRL switches it off in preference training, where two
            passes must agree.
        targets: last names of the layers, such as "q_proj"; None takes every linear layer.
        layers: decoder layers that get them, 0-based; None for all.

    Raises:
        ValueError: a value is out of its range.
    """

    r: int = 128
    alpha: int = 256
    dropout: float = 0.05
    targets: tuple[str, ...] | None = None
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise ValueError(f"layers = {list(self.layers)}: at least one, from 0 on, or null")
        if self.r < 1 or self.alpha < 1:
            raise ValueError(f"r = {self.r}, alpha = {self.alpha}: both must be at least 1")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout = {self.dropout}: must be in [0, 1)")


@dataclass(frozen=True, kw_only=True)
class ModelSettings:
    """The model a training starts from, and which of its parts learn.

    Attributes:
        name: "embedded", a folder, or an id on the Hugging Face hub.
        dtype: of the weights in memory; "auto" as they are stored. Full training under
            `run.precision: bf16` keeps float32 weights and computes in bfloat16; with LoRA the
            frozen weights may be bfloat16.
        attention: the library's implementation: "sdpa", "eager", "flash_attention_2" ...
        methods: methods that are built into the model, as text: "MMA()". They act in training as
            in use, and are stored with what is trained. A model that has some keeps them, and is
            given no others.
        learns: the parts that learn. With `lora` the language model's part are its adapters;
            "methods" are the weights of the built-in methods.
        method_parts: which of those weights learn, by the names of their modules from the class
            on, such as "CrossLMM.v2v"; the others are frozen as they are. Empty: all of them.
        lora: adapters in place of the language model's own weights; None trains those.
        chat_template: "model", "simple", or the path of a Jinja file, as in `mmlm generate`.

    Raises:
        ValueError: nothing learns, adapters are asked for in a frozen language model, or a method
            has no text form.
    """

    name: str = "embedded"
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    attention: str = "sdpa"
    methods: tuple[str, ...] = ()
    learns: tuple[Part, ...] = ("language",)
    method_parts: tuple[str, ...] = ()
    lora: LoraSettings | None = None
    chat_template: str = "model"

    def __post_init__(self) -> None:
        if not self.learns:
            raise ValueError(
                "learns is empty: give language, projector, tower, methods or some of them"
            )
        if self.method_parts and "methods" not in self.learns:
            raise ValueError(
                f"method_parts = {list(self.method_parts)}, but learns = {list(self.learns)}: add "
                "methods, or leave method_parts out"
            )
        if self.lora is not None and "language" not in self.learns:
            raise ValueError(
                f"lora adapts the language model, but learns = {list(self.learns)}: add "
                "language, or leave lora out"
            )


@dataclass(frozen=True, kw_only=True)
class Optimisation:
    """AdamW, its schedule, and how a batch is laid out over time and processes.

    Attributes:
        learning_rate: at the peak.
        projector_learning_rate: of the projector, None for the same (LLaVA's LoRA stage: 2e-5
            beside 2e-4).
        schedule: what follows the warm-up.
        warmup: share of the steps in which the rate grows from 0.
        epochs: passes over the data.
        steps: optimiser steps instead of `epochs`, None to count epochs.
        batch_size: rows of an optimiser step, over all processes (SENTINEL, MIA-DPO: 64).
        rows_per_pass: rows of one forward pass in one process; the rest of a batch follows by
            accumulation. Losses do not depend on it, but for token means (NLL), which are taken
            over a pass.
        weight_decay: of AdamW.
        betas: AdamW's decay rates.
        max_grad_norm: gradients are scaled down to this norm.
        activation_checkpointing: recomputes activations in the backward pass, for memory.
        shuffle: draws a new order in every epoch; False keeps that of the files.
        group_by_length: puts rows of similar length into a batch, so that little is padding.

    Raises:
        ValueError: a value is out of its range.
    """

    learning_rate: float
    projector_learning_rate: float | None = None
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    warmup: float = 0.0
    epochs: float = 1.0
    steps: int | None = None
    batch_size: int = 64
    rows_per_pass: int = 1
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.999)
    max_grad_norm: float = 1.0
    activation_checkpointing: bool = False
    shuffle: bool = True
    group_by_length: bool = False

    def __post_init__(self) -> None:
        for name in ("learning_rate", "projector_learning_rate"):
            rate = getattr(self, name)
            if rate is not None and not 0 < rate < math.inf:
                raise ValueError(f"{name} = {rate}: must be positive and finite")
        if not 0 <= self.warmup < 1:
            raise ValueError(f"warmup = {self.warmup}: the share of the steps, in [0, 1)")
        if not self.epochs > 0:
            raise ValueError(f"epochs = {self.epochs}: must be positive")
        if self.group_by_length and not self.shuffle:
            raise ValueError("group_by_length draws an order of its own: leave shuffle at true")
        for name in ("steps", "batch_size", "rows_per_pass"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} = {value}: must be at least 1")

    def accumulation(self, processes: int) -> int:
        """Forward passes of one process in an optimiser step.

        Raises:
            ValueError: the batch cannot be shared equally; says which sizes can.
        """
        at_once = self.rows_per_pass * processes
        if self.batch_size % at_once:
            raise ValueError(
                f"batch_size = {self.batch_size} is no multiple of rows_per_pass x processes = "
                f"{self.rows_per_pass} x {processes} = {at_once}"
            )
        return self.batch_size // at_once
