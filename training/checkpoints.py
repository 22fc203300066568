"""Checkpoints of transformers' Trainer that survive a kill at any moment, and the run they are of.

The Trainer writes a checkpoint file by file. Here a checkpoint counts only once the file
``complete.json`` is in it, which is written last, when all processes have finished theirs::

    with open_run(output, configuration) as run:
        if run.finished:
            ...                                   # nothing to do
        trainer = Trainer(..., callbacks=saving.callbacks())
        train(trainer, run)                       # goes on from the last complete checkpoint
        ...                                       # export
        run.finish({"loss": 0.31})

Files of a run: ``run.json`` (its configuration), ``checkpoint-N/complete.json``, ``finished.json``,
``lock``. The folder must be on a file system that all processes see.
"""

from __future__ import annotations

import functools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open
from transformers import PreTrainedModel, TrainerCallback
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from mmlm.errors import InputError, MissingTensors
from mmlm.records import INFORMATION, differences, plain_json, write_json
from training.adapters import is_peft
from training.gather import on_main, process_count, wait_for_all
from training.launch import say
from training.snapshot import exclusive

if TYPE_CHECKING:
    from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

__all__ = [
    "FINISHED",
    "MARKER",
    "RUN_RECORD",
    "CompleteCheckpoints",
    "RunFolder",
    "complete_checkpoints",
    "open_run",
    "train",
]

RUN_RECORD = "run.json"
MARKER = "complete.json"
FINISHED = "finished.json"
_NAME = re.compile(r"checkpoint-(\d+)")


class _AlreadyTrainedError(Exception):
    """The checkpoint that was resumed from is the last one of its training."""


@dataclass(frozen=True)
class RunFolder:
    """The output folder of one training, held for it.

    Attributes:
        output: the folder.
        resume_from: the last complete checkpoint, None at the beginning.
        finished: what an earlier run noted at its end, None if there is more to do.
    """

    output: Path
    resume_from: Path | None
    finished: dict[str, Any] | None

    def finish(self, facts: Mapping[str, Any]) -> None:
        """Notes that nothing is left to do; all processes must call it.

        Args:
            facts: JSON values for whoever looks at the run later, such as its last metrics.
        """
        on_main(lambda: write_json(self.output / FINISHED, plain_json(facts)))


@contextmanager
def open_run(
    output: Path,
    configuration: Mapping[str, Any],
    information: Mapping[str, Any] | None = None,
) -> Iterator[RunFolder]:
    """Holds an output folder for one training and finds out where to go on.

    What a kill has left behind half-written is removed, with a message. All processes must call
    it, after the process group has been made; the first one does the work.

    Args:
        output: made if missing.
        configuration: everything that changes what is learned, as JSON values.
        information: further JSON values to store, which may differ from run to run.

    Yields:
        The folder and the state of the run.

    Raises:
        InputError: another process holds the folder, it belongs to another configuration (the
            differing fields are named), or its checkpoint was made by another number of processes.
    """
    count = process_count()
    with ExitStack() as held:

        def prepare() -> tuple[Path | None, dict[str, Any] | None]:
            held.enter_context(exclusive(output))
            _claim(output, {**plain_json(configuration), INFORMATION: information or {}})
            last = _clean(output)
            if last is not None:
                _check_processes(last, count)
            done = output / FINISHED
            return last, json.loads(done.read_text("utf-8")) if done.exists() else None

        yield RunFolder(output, *on_main(prepare))


def _claim(output: Path, record: Mapping[str, Any]) -> None:
    """Makes sure that a folder belongs to this configuration; a new folder from now on does."""
    path = output / RUN_RECORD
    advice = "Choose another --output, or remove that folder to start over."
    if not path.exists():
        if any(_NAME.fullmatch(one.name) for one in output.iterdir()):
            raise InputError(
                f"{str(output)!r} holds checkpoints, but no {RUN_RECORD}: another program wrote "
                "them",
                advice="Choose another --output.",
            )
        write_json(path, record)
        return
    try:
        stored = json.loads(path.read_text("utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged: {error}", advice=advice) from error
    changed = [f"{name} was {old}, now {new}" for name, old, new in differences(stored, record)]
    if changed:
        raise InputError(
            f"{str(output)!r} belongs to another training: {'; '.join(changed)}", advice=advice
        )


def _clean(output: Path) -> Path | None:
    """Removes what is not complete; the last complete checkpoint."""
    for path in _all_checkpoints(output):
        if reason := _flaw(path):
            say(f"{path} is not complete ({reason}); it is removed.")
            _remove(path)
    complete = complete_checkpoints(output)
    return complete[-1] if complete else None


def _flaw(path: Path) -> str:
    """Why a checkpoint cannot be used; empty if it can."""
    marker = path / MARKER
    if not marker.exists():
        return "the run was cut off while it was written"
    sizes = json.loads(marker.read_text("utf-8"))["files"]
    changed = sorted(
        name
        for name, size in sizes.items()
        if not (path / name).is_file() or (path / name).stat().st_size != size
    )
    return f"{', '.join(changed[:3])} missing or of another size" if changed else ""


def _check_processes(checkpoint: Path, count: int) -> None:
    made_by = json.loads((checkpoint / MARKER).read_text("utf-8"))["processes"]
    if made_by != count:
        raise InputError(
            f"{checkpoint} was made by {made_by} processes, now there are {count}: optimizer and "
            "order of the data are divided among the processes",
            advice=f"Start {made_by} processes, or choose another --output.",
        )


def _all_checkpoints(output: Path) -> list[Path]:
    """Folders named like checkpoints, by step."""
    found = [path for path in output.iterdir() if _NAME.fullmatch(path.name) and path.is_dir()]
    return sorted(found, key=_step)


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


def complete_checkpoints(output: Path) -> list[Path]:
    """The complete checkpoints of a run, by step.

    Args:
        output: folder of the run.
    """
    return [path for path in _all_checkpoints(output) if (path / MARKER).exists()]


def _remove(checkpoint: Path) -> None:
    """Removes a checkpoint so that a kill in between does not leave one that looks complete."""
    (checkpoint / MARKER).unlink(missing_ok=True)
    shutil.rmtree(checkpoint)


class CompleteCheckpoints(TrainerCallback):
    """Marks checkpoints as complete when all of it is on the disk, and removes old ones then.

    Removing is done here, not by the Trainer's ``save_total_limit``: that one removes an old
    checkpoint before the new one is complete, so that a kill could leave none.

    Args:
        keep: newest checkpoints that stay. The last and the best stay in any case.
    """

    def __init__(self, keep: int = 2) -> None:
        self.keep = keep

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Refuses a second hand that removes checkpoints; ends a training that is at its end."""
        if args.save_total_limit is not None:
            raise ValueError(
                f"save_total_limit = {args.save_total_limit}: leave it None, "
                f"CompleteCheckpoints(keep={self.keep}) removes old checkpoints"
            )
        marker = Path(args.output_dir, f"checkpoint-{state.global_step}", MARKER)
        if marker.exists() and json.loads(marker.read_text("utf-8"))["last"]:
            raise _AlreadyTrainedError

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **more: Any
    ) -> None:
        """Completes the checkpoint that was just written."""
        output = Path(args.output_dir)
        folder = output / f"checkpoint-{state.global_step}"
        wait_for_all()
        if args.local_process_index == 0:  # one process of each machine empties its cache
            for path in folder.rglob("*"):
                _flush(path)
            _flush(folder)
        wait_for_all()
        if args.process_index == 0:
            marker = {
                "step": state.global_step,
                "processes": args.world_size,
                # After an early stop too: what is resumed from it has nothing left to do.
                "last": control.should_training_stop,
                "files": _sizes(folder),
            }
            write_json(folder / MARKER, marker)
            _flush(folder)
            _remove_old(output, self.keep, state)


def _flush(path: Path) -> None:
    """Waits until a file or folder is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sizes(folder: Path) -> dict[str, int]:
    return {
        str(path.relative_to(folder)): path.stat().st_size
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def _remove_old(output: Path, keep: int, state: TrainerState) -> None:
    """Removes the oldest complete checkpoints, but never the last or the best."""
    complete = complete_checkpoints(output)
    best = {state.best_global_step}
    if state.best_model_checkpoint is not None:
        best.add(_step(Path(state.best_model_checkpoint)))
    spared = [path for path in complete if _step(path) in best]
    others = [path for path in complete[:-1] if path not in spared]
    excess = len(complete) - max(keep, len({complete[-1], *spared}))
    for path in others[: max(0, excess)]:
        _remove(path)


def train(trainer: Trainer, run: RunFolder) -> None:
    """Trains to the end, from the last complete checkpoint if there is one.

    After it the trainer's model is the trained one: the last, or with ``load_best_model_at_end``
    the best. transformers alone would make one step too many when it resumes from the checkpoint
    of a training that had ended within an epoch.

    Args:
        trainer: with the callback `CompleteCheckpoints`, its ``output_dir`` the run's folder.
        run: see `open_run`.
    """
    if run.resume_from is not None:
        say(f"Going on from {run.resume_from}.")
        _check_names(trainer, run.resume_from)
    start = None if run.resume_from is None else str(run.resume_from)
    with _own_names(trainer.model):
        try:
            trainer.train(resume_from_checkpoint=start)
        except _AlreadyTrainedError:
            best = trainer.state.best_model_checkpoint
            if trainer.args.load_best_model_at_end and best is not None:
                trainer._load_best_model()


@contextmanager
def _own_names(model: Any) -> Iterator[None]:
    """Has checkpoints written under the names that the tensors have in memory.

    transformers stores LLaVA, Qwen2.5-VL and others under names of earlier releases, but its
    Trainer reads a checkpoint back by the present ones and passes over what is missing: a resumed
    training, or the best model at the end, would be the untrained one, without a word. Both forms
    load everywhere else. (Adapters are PEFT's business, and DeepSpeed keeps its own state.)
    """
    if is_peft(model) or not isinstance(model, PreTrainedModel):
        yield
        return
    model.save_pretrained = functools.partial(model.save_pretrained, save_original_format=False)
    try:
        yield
    finally:
        del model.save_pretrained  # the class's own again


def _check_names(trainer: Trainer, checkpoint: Path) -> None:
    """Refuses a checkpoint that lacks weights of the model, which the Trainer would pass over."""
    index, whole = checkpoint / SAFE_WEIGHTS_INDEX_NAME, checkpoint / SAFE_WEIGHTS_NAME
    if trainer.is_deepspeed_enabled or is_peft(trainer.model):
        return
    if index.exists():
        stored = set(json.loads(index.read_text("utf-8"))["weight_map"])
    elif whole.exists():
        with safe_open(whole, "pt") as file:
            stored = set(file.keys())
    else:
        return
    if missing := sorted({name for name, _ in trainer.model.named_parameters()} - stored):
        raise MissingTensors(
            f"{checkpoint} lacks {len(missing)} tensors of the model, such as {missing[0]!r}.",
            advice="Remove that checkpoint; the same command goes on from the one before.",
        )
