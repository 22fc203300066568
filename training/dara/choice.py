"""What a training on episodes leaves behind, and which of several is kept."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mmlm.errors import InputError

__all__ = ["FACTORS", "RESULT", "choose", "write_result"]

FACTORS = "factors.safetensors"
RESULT = "result.json"
_PREFIX = "mmlm_methods.DARA."


def write_result(folder: Path, trainer: Any, about: dict[str, Any]) -> None:
    """Writes the factors (if DARA is what learned) and `result.json`; all processes come here.

    The file of the factors is what ``DARA(weights_file=...)`` reads; `result.json` says for which
    model, layers, heads, images and tasks they were learned, how many parameters that were, and the
    loss on held-out episodes.

    Args:
        folder: Of the training.
        trainer: Finished, with the best weights loaded.
        about: Further facts, as JSON values.
    """
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.weights import write
    from training.dara.learning import built_dara
    from training.export import method_tensors
    from training.gather import gathered_state, on_main
    from training.model import count_parameters

    model, method = trainer.model, built_dara(trainer.model)
    state = gathered_state(model, lambda name: _PREFIX in name)
    learning, whole = count_parameters(model)
    best = trainer.state.best_metric
    result = {
        **about,
        "held_out_loss": None if best is None else float(best),
        "steps": trainer.state.global_step,
        "learning_parameters": learning,
        "all_parameters": whole,
    }
    if method is not None:
        result |= {
            "method": method.text,
            "layers": list(method.layers),
            "heads": Anatomy(model).n_heads,
            "images": method.images,
            "mode": method.mode,
        }

    def work() -> None:
        if method is not None and state:
            own = method_tensors(state, "default", learned=True)
            tensors = {name.removeprefix(_PREFIX): x.float() for name, x in own.items()}
            write(tensors, method.text, folder / FACTORS)
        _write(folder / RESULT, result)

    on_main(work)


def choose(output: Path, name: str, rates: Sequence[float]) -> None:
    """Keeps of one set the rate with the least loss on the held-out episodes.

    Its factors become ``<name>.safetensors`` in the output folder, and ``<name>.json`` says which
    rate it was and what the others had.

    Raises:
        InputError: If no rate has a finite loss.
    """
    from training.gather import on_main
    from training.launch import say

    def work() -> None:
        results = {}
        for rate in rates:
            read = json.loads((output / name / f"{rate:g}" / RESULT).read_text("utf-8"))
            results[rate] = read
        losses = {rate: one["held_out_loss"] for rate, one in results.items()}
        known = {r: x for r, x in losses.items() if x is not None and math.isfinite(x)}
        if not known:
            raise InputError(
                f"No learning rate of {name!r} has a finite loss on the held-out episodes: "
                f"{losses}.",
                advice="Try smaller rates.",
            )
        best = min(known, key=lambda rate: known[rate])
        folder = output / name / f"{best:g}"
        about = {
            **results[best],
            "folder": str(folder.relative_to(output)),
            "held_out_loss_by_rate": {f"{rate:g}": loss for rate, loss in losses.items()},
        }
        if (folder / FACTORS).exists():
            part = output / f".{name}.part"
            shutil.copyfile(folder / FACTORS, part)
            part.replace(output / f"{name}.safetensors")
        _write(output / f"{name}.json", about)
        say(f"{name}: learning rate {best:g}, held-out loss {known[best]:.4f}")

    on_main(work)


def _write(path: Path, value: dict[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    part.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    part.replace(path)
