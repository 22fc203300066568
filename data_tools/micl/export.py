"""Episodes on the disk: pictures, and lines that `mmlm generate` and `mmlm score micl` read."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_tools.micl import TASKS
from data_tools.micl.episodes import Embedding, Episode, Shown, episode
from data_tools.micl.settings import MiclSettings
from data_tools.micl.tasks import Params, Task
from data_tools.records import Outcome
from data_tools.stages import Record

__all__ = ["EpisodeStage", "episode_line", "pixels", "prompt", "records"]

PICTURES = "pictures"


def records(settings: MiclSettings) -> list[dict[str, Any]]:
    """The episodes of a run as records of a stage."""
    return [
        {"id": f"{name}-{number:05d}", "task": name, "number": number}
        for name in settings.tasks
        for number in range(settings.n)
    ]


@dataclass(frozen=True)
class EpisodeStage:
    """Draws episodes and their pictures.

    Attributes:
        settings: Which.
        folder: The output folder; pictures go to ``pictures/`` in it.
        kinds: ``episodes``.
    """

    settings: MiclSettings
    folder: Path
    kinds: tuple[str, ...] = ("episodes",)

    def process(self, records: Iterable[Record]) -> Iterator[Outcome]:
        """Draws the episode of every record."""
        (self.folder / PICTURES).mkdir(parents=True, exist_ok=True)
        nearest: Embedding | None = pixels if self.settings.demos == "nearest" else None
        for record in records:
            task = TASKS[record["task"]]
            if self.settings.hard and task.name == "sudoku":
                task = type(task)(hard=True)
            drawn = episode(
                task,
                self.settings.shots,
                self.settings.seed,
                record["number"],
                split=self.settings.split,
                nearest=nearest,
            )
            line = episode_line(drawn.under(self.settings.condition), record["id"], self.folder)
            line["condition"] = self.settings.condition
            yield Outcome(record["id"], "ok", {"episodes": [line]})


def episode_line(drawn: Episode, identifier: str, folder: Path) -> dict[str, Any]:
    """An episode as a line; its pictures are written beside.

    The line is a question for ``mmlm generate``: ``images``, and a ``prompt`` that says where they
    stand (``marked``). What scoring needs stands in it as well.

    Args:
        drawn: The episode.
        identifier: Its id.
        folder: Paths of pictures are relative to it.
    """
    task = drawn.task
    shown = [*drawn.demos, drawn.query]
    images = [_store(task, one.params, folder) for one in shown if one.params is not None]
    return {
        "id": identifier,
        "images": images,
        "prompt": prompt(task, drawn.demos),
        "marked": True,
        "task": task.name,
        "compare": task.answers,
        "has_latent": task.has_latent,
        "latent": drawn.latent,
        "answer": drawn.query.answer,
        "other_answers": list(drawn.others),
        "demo_answers": [one.answer for one in drawn.demos],
        "params": [one.params for one in shown],
    }


def prompt(task: Task, demos: Sequence[Shown]) -> str:
    """The words of an episode with marks where the pictures stand; ends with "Answer:"."""
    parts = []
    number = 0
    for one in [*demos, None]:
        if one is None or one.params is not None:
            number += 1
            parts.append(f"<image {number}>\n")
        parts.append(f"Question: {task.question}\nAnswer:")
        if one is not None:
            parts.append(f" {one.answer}\n\n")
    return "".join(parts)


def pixels(picture: Image.Image) -> np.ndarray:
    """A picture as 16 x 16 colours around their mean: the plainest embedding for RICES."""
    small: np.ndarray = np.asarray(picture.resize((16, 16), Image.Resampling.BOX), np.float64)
    return small - float(small.mean())


def _store(task: Task, params: Params, folder: Path) -> str:
    """Writes the picture of an item once, under a name made from what it shows."""
    text = json.dumps([task.name, params], sort_keys=True)
    name = f"{task.name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}.png"
    path = folder / PICTURES / name
    if not path.exists():
        stream = io.BytesIO()
        task.draw(params).save(stream, "PNG")
        temporary = path.with_name(f".{name}.tmp")
        temporary.write_bytes(stream.getvalue())
        temporary.replace(path)
    return f"{PICTURES}/{name}"
