"""What ``mmlm data mia answer`` and ``... score`` share: the model, and what determines it."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.options import ModelOptions, open_model
from mmlm.errors import InputError, UnsupportedModel

if TYPE_CHECKING:
    from data_tools.mia.records import Step
    from mmlm.cli.frame import Terminal

__all__ = ["Opener", "model_facts", "open_for_images", "run_of", "total_of"]

Opener = Callable[..., tuple[Any, Any]]
"""Loads a model and its processor; called as `open_for_images`."""


def model_facts(model: ModelOptions) -> dict[str, Any]:
    """What of the model's options determines what it computes."""
    options = dataclasses.asdict(model)
    return {name: options[name] for name in ("id", "dtype", "attention", "chat_template")}


def run_of(root: Path, step: Step) -> str:
    """A hash of everything that determined the lines of an earlier stage.

    Raises:
        InputError: If the stage has not been run.
    """
    from data_tools.records import RUN
    from mmlm.records import INFORMATION

    path = root / step.name / RUN
    if not path.is_file():
        raise InputError(
            f"{str(path.parent)!r} is not there yet.",
            advice=f"Run the stage before this one: mmlm data mia {step.name}",
        )
    run = json.loads(path.read_text(encoding="utf-8"))
    run.pop(INFORMATION, None)
    return f"sha256:{hashlib.sha256(json.dumps(run, sort_keys=True).encode()).hexdigest()}"


def total_of(root: Path, steps: tuple[Step, ...]) -> int | None:
    """Records of all shards together; None while a stage before is there in shards only."""
    from data_tools.mia.records import joined

    try:
        return len(joined(root, steps))
    except InputError:
        return None


def open_for_images(
    options: ModelOptions, terminal: Terminal, layer: int | None, *, measured: bool
) -> tuple[Any, Any]:
    """Loads a model and makes sure that it takes several pictures, and shows its attention.

    Args:
        options: The model.
        terminal: Where to write.
        layer: Decoder layer whose attention is wanted; None for the default one.
        measured: Whether attention is wanted at all.

    Raises:
        MmlmError: If it cannot be loaded, cannot be shown several pictures, has no such layer or
            does not show its attention.
    """
    import mmlm
    from data_tools.mia.prompting import check_several_images
    from data_tools.mia.seen import check_attention

    probes = (mmlm.ImageAttention(layer=layer),) if measured else ()
    model, processor = open_model(options, probes, terminal)
    check_several_images(model, processor)
    if measured:
        try:
            check_attention(model, processor, layer)
        except NotImplementedError as error:
            raise UnsupportedModel(
                f"The attention of this model cannot be measured: {error}",
                advice="Load it with --model.attention sdpa or eager.",
            ) from error
    return model, processor
