"""The trackers: what transformers' own callbacks for them do not do.

Numbers reach every tracker through transformers' callbacks (WandbCallback, TensorBoardCallback,
TrackioCallback). Here stand the check before work, a wandb run that a resumed training continues,
and the things that are no numbers: configuration, pictures, texts.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError

if TYPE_CHECKING:
    from PIL import Image

    from training.tracking.settings import Tracking

__all__ = ["Shown", "callback_class", "check", "send_config", "send_samples", "start_wandb"]

_CLASSES = {
    "wandb": "WandbCallback",
    "tensorboard": "TensorBoardCallback",
    "trackio": "TrackioCallback",
}
WANDB_ID = "wandb_run_id"
"""File in the output folder: a resumed training goes on in the same run of wandb."""
OFFLINE = ("offline", "dryrun", "disabled")


@dataclass(frozen=True)
class Shown:
    """One answer as a tracker shows it.

    Attributes:
        id: of the request.
        pictures: small enough to send.
        prompt: the question.
        text: the answer, or the reason why there is none.
    """

    id: str
    pictures: Sequence[Image.Image]
    prompt: str
    text: str


def check(settings: Tracking) -> None:
    """See `training.tracking.check`."""
    for name in settings.to:
        if find_spec(name) is None:
            raise InputError(
                f"tracking.to has {name!r}, which is not installed",
                advice="pip install 'mmlm[track]', or take it out of tracking.to.",
            )
    if "wandb" in settings.to:
        _check_wandb()


def _check_wandb() -> None:
    import wandb

    mode = os.environ.get("WANDB_MODE") or wandb.setup().settings.mode
    if mode in OFFLINE:
        return
    try:
        logged_in, reason = wandb.login(prompt=False), "nobody is logged in"
    except wandb.errors.Error as error:
        logged_in, reason = False, str(error)
    if not logged_in:
        raise InputError(
            f"wandb is to send the run to its server, but {reason}",
            advice="Set WANDB_MODE=offline (no account is needed; `wandb sync` sends the run "
            "later), or log in with `wandb login`.",
        )


def callback_class(name: str) -> type:
    """Transformers' callback for a tracker."""
    from transformers.integrations import integration_utils

    return getattr(integration_utils, _CLASSES[name])


def start_wandb(settings: Tracking, name: str, config: Mapping[str, Any], output: Path) -> Any:
    """Opens the run that transformers' callback will then find open.

    Args:
        settings: project.
        name: of the run.
        config: goes into the run's configuration.
        output: keeps the run's id; its files are there too unless WANDB_DIR says otherwise.

    Returns:
        The run.
    """
    import wandb

    known = output / WANDB_ID
    identifier = known.read_text("utf-8").strip() if known.exists() else None
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", settings.project),
        name=name,
        id=identifier,
        dir=os.environ.get("WANDB_DIR", str(output)),
        config=dict(config),
        # Offline, wandb says that it ignores the wish; runs of one id are joined when synced.
        resume=None if os.environ.get("WANDB_MODE") in OFFLINE else "allow",
    )
    known.write_text(run.id + "\n", "utf-8")
    return run


def send_config(callback: Any, name: str, config: Mapping[str, Any]) -> None:
    """Gives a tracker the configuration; wandb has it from its start.

    Args:
        callback: transformers' callback of the tracker, after its own start.
        name: of the tracker.
        config: JSON values.
    """
    if name == "tensorboard":
        # An indented block is shown as it stands.
        text = json.dumps(config, indent=2, default=str)
        callback.tb_writer.add_text("run", "    " + text.replace("\n", "\n    "))
    elif name == "trackio":
        import trackio

        trackio.config.update(dict(config))


def send_samples(callback: Any, name: str, step: int, shown: Sequence[Shown]) -> None:
    """Gives a tracker pictures and answers.

    Args:
        callback: transformers' callback of the tracker.
        name: of the tracker.
        step: optimiser steps made.
        shown: the answers.
    """
    if name == "tensorboard":
        _to_tensorboard(callback.tb_writer, step, shown)
    elif name == "wandb":
        _to_wandb(step, shown)
    else:
        _to_trackio(step, shown)


def _to_wandb(step: int, shown: Sequence[Shown]) -> None:
    """Pictures with their answers below, and a table of the texts.

    Pictures inside a table would lie in the user's home folder until the run is synced, and not in
    the run's folder that people copy from a machine without network.
    """
    import wandb

    pictures = [
        wandb.Image(_side_by_side(one.pictures), caption=f"{one.id}: {one.text}") for one in shown
    ]
    rows = [[step, one.id, one.prompt, one.text] for one in shown]
    table = wandb.Table(columns=["step", "id", "question", "answer"], data=rows)
    wandb.log({"samples/pictures": pictures, "samples/texts": table, "train/global_step": step})


def _to_trackio(step: int, shown: Sequence[Shown]) -> None:
    import pandas as pd
    import trackio

    rows = {
        "id": [one.id for one in shown],
        "picture": [trackio.Image(_side_by_side(one.pictures)) for one in shown],
        "question": [one.prompt for one in shown],
        "answer": [one.text for one in shown],
    }
    trackio.log({"samples": trackio.Table(dataframe=pd.DataFrame(rows))}, step=step)


def _to_tensorboard(writer: Any, step: int, shown: Sequence[Shown]) -> None:
    import numpy as np

    for one in shown:
        picture = np.asarray(_side_by_side(one.pictures))
        writer.add_image(f"samples/{one.id}", picture, step, dataformats="HWC")
        writer.add_text(f"samples/{one.id}", f"{one.prompt}\n\n**{one.text}**", step)
    writer.flush()


def _side_by_side(pictures: Sequence[Image.Image]) -> Image.Image:
    """One picture for trackers that show one per cell; a white dot if there is none."""
    from PIL import Image

    width = sum(picture.width for picture in pictures)
    height = max((picture.height for picture in pictures), default=1)
    whole = Image.new("RGB", (max(width, 1), height), "white")
    left = 0
    for picture in pictures:
        whole.paste(picture, (left, 0))
        left += picture.width
    return whole
