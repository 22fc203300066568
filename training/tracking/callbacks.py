"""The callbacks that watch a Trainer: speed, log, samples, progress."""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from mmlm.progress import progress_bar
from training.snapshot import Journal

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["LOG", "LogFile", "Meter", "ProgressLines"]

LOG = "log.jsonl"


class Meter(TrainerCallback):
    """Adds speed and memory to each log entry of the training.

    * `tokens_per_second`: tokens that the model reads, padding left out, of chosen and rejected
      answers alike, with the placeholders of the pictures;
    * `scored_tokens_per_second`: those among them that the loss is about (left out
      if the Trainer keeps the labels to itself, as with label smoothing);
    * `samples_per_second`: rows of the data;
    * `memory_gib`: highest so far, of one process: on the GPU, else resident in memory.

    Speeds are of all processes together. Time for evaluations, checkpoints and samples is left
    out; time for loading data counts.

    Tokens are read from the first pass of each batch: a hook on the model sums two masks where they
    are, and the sums leave the device once per log entry.

    Args:
        trainer: the Trainer that is watched.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._hook: Any = None
        self._counted = False
        self._clear()

    def _clear(self) -> None:
        self._tokens: Tensor | int = 0
        self._seconds, self._steps = 0.0, 0
        self._mark = time.monotonic()

    def pause_is_over(self) -> None:
        """Whatever was done since the last step does not count as training."""
        self._mark = time.monotonic()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self.close()
        self._hook = self._trainer.model.register_forward_pre_hook(self._count, with_kwargs=True)
        self._clear()

    def close(self) -> None:
        """Takes the hook off the model."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _count(self, module: Any, args: tuple[Any, ...], batch: Mapping[str, Any]) -> None:
        # The reference's pass has no gradient, and further losses make further passes.
        if self._counted or not (module.training and torch.is_grad_enabled()):
            return
        self._counted = True
        ids, mask, labels = (batch.get(n) for n in ("input_ids", "attention_mask", "labels"))
        read = ids.new_tensor(ids.numel()) if mask is None or mask.ndim != 2 else mask.sum()
        scored = ids.new_tensor(0) if labels is None else (labels[:, 1:] != -100).sum()
        self._tokens = self._tokens + torch.stack([read, scored])

    def on_step_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self._counted = False

    def on_substep_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self._counted = False

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self._pass_time()
        self._steps += 1

    def on_evaluate(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self.pause_is_over()

    def on_save(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self.pause_is_over()

    def on_log(  # noqa: D102
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **more: Any
    ) -> None:
        if "loss" not in logs or not self._steps:
            return
        self._pass_time()  # the loss has left the device: all steps are done
        measured = self._measured(args)
        logs.update(measured)
        state.log_history[-1].update(measured)
        self._clear()

    def _pass_time(self) -> None:
        now = time.monotonic()
        self._seconds, self._mark = self._seconds + now - self._mark, now

    def _measured(self, args: Any) -> dict[str, float]:
        accelerator = self._trainer.accelerator
        device = accelerator.device
        tokens = torch.zeros(2) if isinstance(self._tokens, int) else self._tokens.cpu()
        own = torch.tensor([[*tokens.tolist(), _memory(device)]], dtype=torch.float32)
        everyone = accelerator.gather(own.to(device)).cpu()
        read, scored = everyone[:, :2].sum(0).tolist()
        rows = self._trainer.args.train_batch_size * args.gradient_accumulation_steps
        known = {"scored_tokens_per_second": scored / self._seconds} if scored else {}
        return {
            "tokens_per_second": read / self._seconds,
            **known,
            "samples_per_second": self._steps * rows * accelerator.num_processes / self._seconds,
            "memory_gib": everyone[:, 2].max().item(),
        }


def _memory(device: torch.device) -> float:
    """Highest memory so far in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


class LogFile(TrainerCallback):
    """Every log entry as a line of `log.jsonl`, with `step` and `seconds` since the beginning.

    A resumed training drops the lines behind the step it goes on from.

    Args:
        folder: of the run.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / LOG
        self._journal: Journal | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        if not state.is_world_process_zero:
            return
        self._journal = Journal(self._path, state.global_step)
        lines = self._path.read_text("utf-8").splitlines()
        former = json.loads(lines[-1])["seconds"] if lines else 0.0
        self._began = time.monotonic() - former

    def on_log(  # noqa: D102
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **more: Any
    ) -> None:
        if self._journal is not None:
            seconds = round(time.monotonic() - self._began, 3)
            self._journal.write({"step": state.global_step, "seconds": seconds, **logs})


class ProgressLines(TrainerCallback):
    """A bar on a terminal, plain lines elsewhere, on standard error of the first process.

    Args:
        show: see `training.tracking.Tracking.progress`.
        title: what the bar is about.
    """

    def __init__(self, show: str, title: str) -> None:
        self._lines = show != "never"
        self._forced = show == "always"
        self._bar = self._forced or (show == "auto" and sys.stderr.isatty())
        self._title, self._stack = title, ExitStack()

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self._lines = self._lines and state.is_world_process_zero
        bar = progress_bar(
            state.max_steps,
            self._bar and self._lines,
            self._title,
            done=state.global_step,
            force=self._forced,
        )
        self._advance = self._stack.enter_context(bar)
        self._drawn = self._first = state.global_step
        self._remark, self._began = "", time.monotonic()

    def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:  # noqa: D102
        self._advance(state.global_step - self._drawn, self._remark)
        self._drawn = state.global_step

    def on_log(  # noqa: D102
        self, args: Any, state: Any, control: Any, logs: dict[str, Any], **more: Any
    ) -> None:
        if not self._lines:
            return
        if "loss" in logs:
            if self._bar:
                self._remark = f"[default]{_brief(logs, _WATCHED[:2])}"
                self._advance(0, self._remark)
            else:
                self._print(state, f"{_brief(logs)}  {self._left(state)}")
        elif evaluation := {k: v for k, v in logs.items() if k.startswith("eval_")}:
            self._print(state, _brief(evaluation))

    def _print(self, state: Any, text: str) -> None:
        print(
            f"{self._title} {state.global_step}/{state.max_steps}  {text}",
            file=sys.stderr,
            flush=True,
        )

    def _left(self, state: Any) -> str:
        made = max(state.global_step - self._first, 1)
        seconds = (time.monotonic() - self._began) / made * (state.max_steps - state.global_step)
        hours, minutes = divmod(round(seconds) // 60, 60)
        return f"{hours}:{minutes:02}:{round(seconds) % 60:02} left"

    def close(self) -> None:
        """Takes the bar off the terminal; the cursor is back."""
        self._stack.close()


_WATCHED = (
    ("loss", "loss"),
    ("rewards/margins", "margin"),
    ("rewards/accuracies", "accuracy"),
    ("learning_rate", "lr"),
    ("tokens_per_second", "tokens/s"),
)
_DULL = ("eval_runtime", "eval_samples_per_second", "eval_steps_per_second", "epoch")


def _brief(logs: Mapping[str, Any], watched: Sequence[tuple[str, str]] = _WATCHED) -> str:
    """The few numbers that a person watches, in a fixed order; of scores of samples all."""
    prefix = "" if "loss" in logs else "eval_"
    known = {prefix + key: prefix + name for key, name in watched}
    if not logs.keys() & known.keys():
        known = {key: key for key in logs if key not in _DULL}
    return "  ".join(f"{name} {logs[key]:.4g}" for key, name in known.items() if key in logs)
