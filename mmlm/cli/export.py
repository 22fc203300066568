"""``mmlm export``: a checkpoint of a training as a folder that others can load."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import check_model_name
from mmlm.errors import InputError
from mmlm.progress import library_bars

__all__ = ["COMMAND", "Export", "run"]


@dataclass(frozen=True)
class Export:
    """Options of ``mmlm export``.

    Attributes:
        checkpoint: Output folder of a training (its best checkpoint is taken, or its last), one of
            its checkpoints, or a folder with an adapter.
        output: Folder for the export; it must be new or empty.
        what: `merged` is the whole model with the adapter folded in, `adapter` the adapter alone,
            `model` the whole model of a training without adapter; `auto` is `merged` or `model`.
        base: Base model of an adapter, instead of the one that it names.
        dtype: Number format of the weights; `auto` is the one they are stored in.
    """

    checkpoint: Path
    output: Path
    what: Literal["auto", "adapter", "merged", "model"] = "auto"
    base: str = ""
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"


def run(settings: Export, terminal: Terminal) -> int:
    """Writes the export.

    Raises:
        InputError: If there is no such checkpoint, or the output exists.
        MissingTensors: If weights are missing.
    """
    output = settings.output
    if output.exists() and (output.is_file() or any(output.iterdir())):
        raise InputError(f"{str(output)!r} exists already.", advice="Choose another --output.")
    if settings.base:
        check_model_name(settings.base)
    from training.export import export
    from training.stored import find_checkpoint

    library_bars(terminal.progress)
    found = find_checkpoint(settings.checkpoint)
    what = settings.what
    if what == "auto":
        what = "merged" if found.is_adapter else "model"
    if found.is_adapter == (what == "model"):
        kind = "an adapter" if found.is_adapter else "a whole model"
        advice = "merged or adapter" if found.is_adapter else "model"
        raise InputError(
            f"{str(found.folder)!r} holds {kind}; it cannot be exported as {what!r}.",
            advice=f"Use --what {advice}.",
        )
    terminal.note(f"Exporting {found.folder} ...")
    model, processor = found.load(settings.base, settings.dtype)
    output.parent.mkdir(parents=True, exist_ok=True)
    export(model, processor, output, what, found.card(settings.base))
    answer = {"checkpoint": str(found.folder), "what": what, "output": str(output)}
    if terminal.json:
        terminal.emit(answer)
    terminal.say(f"{what} of {found.folder} written to {output}")
    return DONE


COMMAND = Command(
    summary="write a checkpoint of a training as a folder that plain transformers reads",
    settings=Export,
    run=run,
    positional=("checkpoint",),
    example="mmlm export runs/sentinel --output sentinel-7b\n"
    "mmlm export runs/sentinel/checkpoint-100 --output adapter --what adapter",
)
