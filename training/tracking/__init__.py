"""What is written down about a training while it runs, and where it goes.

    tracking.check(settings)                      # before anything is loaded
    trainer = ...                                 # report_to=settings.to
    with tracking.tracked(trainer, settings, run_config=run.config, output=run.output):
        trainer.train(resume_from_checkpoint=...)

Works with transformers' Trainer and everything built on it (TRL), also under DeepSpeed. In the
output folder it leaves `log.jsonl` (every log entry), `samples.jsonl` (what the model said about
held-out pictures), `provenance.json` and `training.png`; trackers get the same and more.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from training.tracking.samples import HeldOut
from training.tracking.settings import Tracking

__all__ = ["HeldOut", "Tracking", "check", "tracked"]


def check(settings: Tracking) -> None:
    """Refuses what would fail after the model is loaded: a tracker that cannot be used.

    Raises:
        InputError: a tracker is not installed, or wandb is to send and nobody is logged in.
    """
    from training.tracking.trackers import check as check_trackers

    check_trackers(settings)


def tracked(
    trainer: Any,
    settings: Tracking,
    *,
    run_config: Mapping[str, Any],
    output: Path,
    title: str = "training",
) -> AbstractContextManager[None]:
    """Watches `trainer.train()` inside the block; outside of it the trainer is as it was.

    Args:
        trainer: a transformers `Trainer`, on every process; its `processing_class` is the
            processor that samples are made with. `report_to=settings.to` in its arguments is
            welcome, but not needed.
        settings: what is wanted.
        run_config: the whole configuration, for trackers.
        output: folder of the run, where checkpoints are.
        title: name of the stage, on the progress bar and on the figure.
    """
    from training.tracking.session import tracked as watch

    return watch(trainer, settings, run_config=run_config, output=output, title=title)
