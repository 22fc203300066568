"""Everything that watches one training, put on a Trainer and taken off again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from transformers import PrinterCallback, ProgressCallback, TrainerCallback

from mmlm.records import write_json
from training.tracking.callbacks import LogFile, Meter, ProgressLines
from training.tracking.figure import write_figure
from training.tracking.provenance import provenance
from training.tracking.rounds import SampleRounds
from training.tracking.settings import Tracking
from training.tracking.trackers import callback_class, send_config, start_wandb

__all__ = ["tracked"]

PROVENANCE, FIGURE = "provenance.json", "training.png"


@contextmanager
def tracked(
    trainer: Any,
    settings: Tracking,
    *,
    run_config: Mapping[str, Any],
    output: Path,
    title: str,
) -> Iterator[None]:
    """See `training.tracking.tracked`."""
    handler = trainer.callback_handler
    first = trainer.is_world_process_zero()
    name = settings.name or output.name
    config = {"run": dict(run_config), "provenance": provenance()}
    with ExitStack() as stack:
        stack.callback(setattr, handler, "callbacks", list(handler.callbacks))
        if first:
            output.mkdir(parents=True, exist_ok=True)
            write_json(output / PROVENANCE, config["provenance"])
            stack.push(lambda *error: write_figure(output / "log.jsonl", output / FIGURE, title))
            if "wandb" in settings.to:
                run = start_wandb(settings, name, config, output)
                stack.push(lambda kind, *error: run.finish(exit_code=int(kind is not None)))
        # Read by transformers' callbacks.
        trainer.args.project, trainer.args.run_name = settings.project, name
        trackers = _trackers(handler.callbacks, settings)
        if "tensorboard" in trackers and trackers["tensorboard"].logging_dir is None:
            trackers["tensorboard"].logging_dir = str(output / "tensorboard")
        meter, lines = Meter(trainer), ProgressLines(settings.progress, title)
        stack.callback(meter.close)
        stack.callback(lines.close)
        ours: list[TrainerCallback] = [meter, LogFile(output), lines]
        if settings.samples is not None:
            ours.append(
                SampleRounds(
                    trainer, settings.samples, settings, output, trackers, meter.pause_is_over
                )
            )
        theirs = [
            one
            for one in handler.callbacks
            if not isinstance(one, PrinterCallback | ProgressCallback)
        ]
        added = [one for one in trackers.values() if one not in theirs]
        # Ours come first: what the meter adds to a log entry, the trackers must see.
        handler.callbacks = [*ours, *theirs, *added, _Configuration(trackers, config)]
        yield


def _trackers(callbacks: list[TrainerCallback], settings: Tracking) -> dict[str, TrainerCallback]:
    """Transformers' callbacks of the trackers: those that `report_to` made, else new ones."""
    found = {}
    for name in settings.to:
        kind = callback_class(name)
        made = [one for one in callbacks if isinstance(one, kind)]
        found[name] = made[0] if made else kind()
    return found


class _Configuration(TrainerCallback):
    """Sends the configuration as soon as the trackers are started."""

    def __init__(self, trackers: Mapping[str, TrainerCallback], config: Mapping[str, Any]) -> None:
        self._trackers, self._config = trackers, config

    def on_train_begin(self, args: Any, state: Any, control: Any, **more: Any) -> None:
        if state.is_world_process_zero:
            for name, callback in self._trackers.items():
                send_config(callback, name, self._config)
