"""The loop under every stage that is not a Trainer of a library: step, log, snapshot, resume.

accelerate supplies devices, mixed precision, gradient clipping and several processes; the loop
adds what matters on a laptop: a kill at any moment loses a minute at most, and the resumed run
makes the very steps the uninterrupted one would have made.
"""

from __future__ import annotations

import math
import sys
import time
from abc import ABC, abstractmethod
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from mmlm.errors import InputError
from training.scratch.schedule import warmup_cosine
from training.snapshot import Journal, exclusive, read_snapshot, write_snapshot

__all__ = ["Stage", "StageSettings", "run_stage"]


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How long and how fast a stage learns.

    Attributes:
        steps: optimiser steps.
        batch_size: examples a step, over all processes; a multiple of their number.
        learning_rate: peak of AdamW's learning rate.
        warmup_steps: steps of linear warm-up, less than `steps`.
        final_fraction: the cosine ends at this fraction of the peak.
        weight_decay: of matrices; vectors (norms, biases) are not decayed.
        betas: AdamW's decay rates.
        max_grad_norm: gradients are scaled down to this norm.

    Raises:
        ValueError: a value is out of its range.
    """

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int = 0
    final_fraction: float = 0.02
    weight_decay: float = 0.02
    betas: tuple[float, float] = (0.9, 0.98)
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        if self.steps < 1 or self.batch_size < 1:
            raise ValueError(
                f"steps = {self.steps}, batch_size = {self.batch_size}: both must be at least 1"
            )
        if not 0 <= self.warmup_steps < self.steps:
            raise ValueError(
                f"warmup_steps = {self.warmup_steps}: must be in [0, steps = {self.steps})"
            )
        if not 0 < self.learning_rate < math.inf:
            raise ValueError(f"learning_rate = {self.learning_rate}: must be positive and finite")


class Stage(nn.Module, ABC):
    """What one stage trains: a module whose forward pass turns a batch into losses.

    The module's parameters that require gradients are trained; its whole state is in the snapshot.
    """

    name: ClassVar[str]

    @abstractmethod
    def batch(self, step: int, rank: int, world_size: int) -> dict[str, Any]:
        """A process's share of a step's batch: a pure function of the arguments, on the CPU.

        The whole batch does not depend on the number of processes.
        """

    @abstractmethod
    def forward(self, **batch: Any) -> dict[str, Tensor]:
        """Scalars to log, among them `loss`, the one to minimise."""

    def rate(self, parameter_name: str) -> float:
        """Factor on the learning rate of a parameter."""
        return 1.0


@dataclass
class Progress:
    """Where a run stands."""

    step: int = 0
    seconds: float = 0.0


def run_stage(
    stage: Stage,
    settings: StageSettings,
    folder: Path,
    accelerator: Accelerator,
    *,
    fingerprint: str,
    snapshot_seconds: float = 60.0,
    log_every: int = 10,
    stop_after: int | None = None,
) -> Progress:
    """Trains a stage to its last step, going on from the snapshot in its folder if there is one.

    Args:
        stage: trained in place; on return it holds the final weights, also if the stage was
            finished before.
        settings: steps, batch and learning rate.
        folder: gets `snapshot.pt` and `log.jsonl`.
        accelerator: device, precision and processes.
        fingerprint: of the configuration; a snapshot with another one is refused.
        snapshot_seconds: time between snapshots.
        log_every: steps between log lines.
        stop_after: end the run early at this step, with a snapshot (for a session's end).

    Raises:
        InputError: the snapshot belongs to another configuration, another process trains here, or
            the batch cannot be shared equally.
        FloatingPointError: the loss is not finite; the last snapshot stays.
    """
    if settings.batch_size % accelerator.num_processes:
        raise InputError(
            f"batch_size = {settings.batch_size} cannot be shared by {accelerator.num_processes} "
            "processes",
            advice="Choose a batch_size that is a multiple of the number of processes.",
        )
    with exclusive(folder) if accelerator.is_main_process else nullcontext():
        return _Run(stage, settings, folder, accelerator, fingerprint).go(
            snapshot_seconds, log_every, settings.steps if stop_after is None else stop_after
        )


class _Run:
    """One run of a stage, between taking the folder's lock and giving it back."""

    def __init__(
        self,
        stage: Stage,
        settings: StageSettings,
        folder: Path,
        accelerator: Accelerator,
        fingerprint: str,
    ) -> None:
        self.stage, self.settings, self.accelerator = stage, settings, accelerator
        self.fingerprint, self.path = fingerprint, folder / "snapshot.pt"
        self.optimizer = _optimizer(stage, settings)
        self.progress = Progress()
        state = read_snapshot(self.path, fingerprint)
        if state is not None:
            stage.load_state_dict(state["stage"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.progress = Progress(state["step"], state["seconds"])
        self.journal = None
        if accelerator.is_main_process:
            self.journal = Journal(folder / "log.jsonl", self.progress.step)

    def go(self, snapshot_seconds: float, log_every: int, last: int) -> Progress:
        stage, optimizer = self.accelerator.prepare(self.stage, self.optimizer)
        stage.train()
        began = time.monotonic() - self.progress.seconds
        saved = time.monotonic()
        sums: dict[str, float] = {}
        since = self.progress.step
        for step in range(self.progress.step, last):
            for key, value in self._step(stage, optimizer, step).items():
                sums[key] = sums.get(key, 0.0) + value
            self.progress = Progress(step + 1, time.monotonic() - began)
            final = step + 1 == last
            if (step + 1) % log_every == 0 or final:
                self._log({key: value / (step + 1 - since) for key, value in sums.items()})
                sums, since = {}, step + 1
            if final or time.monotonic() - saved >= snapshot_seconds:
                self._save()
                saved = time.monotonic()
        # The wrappers for mixed precision and processes go; the caller has the bare stage again.
        self.accelerator.unwrap_model(stage, keep_fp32_wrapper=False)
        self.accelerator.free_memory()
        return self.progress

    def _step(self, stage: nn.Module, optimizer: Any, step: int) -> dict[str, float]:
        accelerator, settings = self.accelerator, self.settings
        factor = warmup_cosine(step, settings.steps, settings.warmup_steps, settings.final_fraction)
        for group in optimizer.param_groups:
            group["lr"] = settings.learning_rate * group["rate"] * factor
        batch = self.stage.batch(step, accelerator.process_index, accelerator.num_processes)
        losses = stage(**{k: _to(v, accelerator.device) for k, v in batch.items()})
        values = {key: float(value.detach()) for key, value in losses.items()}
        if not math.isfinite(values["loss"]):
            raise FloatingPointError(
                f"stage {self.stage.name}, step {step}: the loss is {values['loss']}; the last "
                f"snapshot is {self.path}. Lower learning_rate or max_grad_norm"
            )
        accelerator.backward(losses["loss"])
        norm = accelerator.clip_grad_norm_(stage.parameters(), settings.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        return {**values, "grad_norm": float(norm), "lr": settings.learning_rate * factor}

    def _log(self, means: dict[str, float]) -> None:
        if self.journal is None:
            return
        done, seconds = self.progress.step, self.progress.seconds
        rounded = {key: float(f"{value:.5g}") for key, value in means.items()}
        self.journal.write(
            {"stage": self.stage.name, "step": done, "seconds": round(seconds, 1), **rounded}
        )
        left = seconds / done * (self.settings.steps - done)
        shown = "  ".join(f"{key} {value:.4g}" for key, value in rounded.items() if key != "lr")
        print(
            f"{self.stage.name} {done}/{self.settings.steps}  {shown}  "
            f"{done / seconds:.2f} steps/s  {left / 60:.1f} min left",
            file=sys.stderr,
            flush=True,
        )

    def _save(self) -> None:
        if not self.accelerator.is_main_process:
            return
        write_snapshot(
            self.path,
            {
                "fingerprint": self.fingerprint,
                "step": self.progress.step,
                "seconds": self.progress.seconds,
                "stage": self.stage.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )


def _optimizer(stage: Stage, settings: StageSettings) -> torch.optim.AdamW:
    """AdamW with one group for each pair of rate and decay."""
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in stage.named_parameters():
        if parameter.requires_grad:
            decay = settings.weight_decay if parameter.ndim > 1 else 0.0
            groups.setdefault((stage.rate(name), decay), []).append(parameter)
    return torch.optim.AdamW(
        [
            {"params": members, "rate": rate, "weight_decay": decay}
            for (rate, decay), members in groups.items()
        ],
        lr=settings.learning_rate,
        betas=settings.betas,
        fused=True,
    )


def _to(value: Any, device: torch.device) -> Any:
    return value.to(device) if isinstance(value, Tensor) else value
