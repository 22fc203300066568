"""What the YAML file says about tracking. No heavy import: `mmlm train --help` reads it too."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, TypeAlias

from mmlm.decoding_settings import GenerateSettings
from training.tracking.samples import HeldOut

__all__ = ["Tracker", "Tracking"]

Tracker: TypeAlias = Literal["wandb", "tensorboard", "trackio"]


@dataclass(frozen=True, kw_only=True)
class Tracking:
    """What is logged, and where to.

    The JSON log and the figure are always written; trackers come on top. wandb needs no account
    with the environment variable WANDB_MODE=offline.

    Attributes:
        to: trackers; default none.
        project: the trackers' name for runs that belong together.
        name: the trackers' name of this run; None takes that of the output folder.
        log_every: optimiser steps between two log entries, at least 1.
        samples: pictures that the model describes now and then, by class path, such as
            `mmlm.cli.held_out.ChairHeldOut`; None for none.
        sample_every: optimiser steps between two rounds of samples, at least 1. There is always
            one before the first step and one after the last.
        generate: how samples are generated; greedy by default, as in the papers' evaluations.
        gather_for_samples: ZeRO-3 only: put the whole model on every device while it generates.
            Off, its layers are fetched anew for every token: slow, but with no more memory than a
            training step.
        progress: "auto" draws a bar on a terminal and writes plain lines elsewhere, "always" draws
            it anywhere, "never" prints nothing.

    Raises:
        ValueError: a value is out of its range.
    """

    to: tuple[Tracker, ...] = ()
    project: str = "mmlm"
    name: str | None = None
    log_every: int = 10
    samples: HeldOut | None = None
    sample_every: int = 100
    generate: GenerateSettings = field(default_factory=lambda: GenerateSettings(max_new_tokens=256))
    gather_for_samples: bool = True
    progress: Literal["auto", "always", "never"] = "auto"

    def __post_init__(self) -> None:
        if self.log_every < 1 or self.sample_every < 1:
            raise ValueError(
                f"log_every = {self.log_every}, sample_every = {self.sample_every}: both must be "
                "at least 1"
            )
        if len(set(self.to)) < len(self.to):
            raise ValueError(f"to = {list(self.to)}: name every tracker once")
        if not self.project:
            raise ValueError("project is empty")
