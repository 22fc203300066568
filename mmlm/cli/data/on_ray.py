"""``--ray``: the stage of a command as actors on a Ray cluster."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import Terminal
from mmlm.errors import InputError

if TYPE_CHECKING:
    from data_tools.records import StageOutput

__all__ = ["RayOptions", "run_actors"]


@dataclass(frozen=True)
class RayOptions:
    """Ray actors instead of this process; needs the extra `ray`.

    Attributes:
        actors: Number of actors; 0 works in this process. Joins the cluster of $RAY_ADDRESS, or
            starts Ray on this machine.
        gpus: GPUs per actor; 0.5 lets two share one.
        batch_size: Pictures that an actor is given at once.
    """

    actors: int = 0
    gpus: float = 1.0
    batch_size: int = 32


def run_actors(
    make_stage: Callable[[], Any],
    rows: Sequence[dict[str, Any]],
    output: StageOutput,
    options: RayOptions,
    terminal: Terminal,
) -> None:
    """Runs a stage in actors; its ``facts`` become the run's under ``loaded``.

    Args:
        make_stage: Makes the stage on a worker: a function of an installed module, or a partial
            one. Paths in its arguments must be absolute.
        rows: All records.
        output: Where the lines go.
        options: How many actors, of what size.
        terminal: Says whether there is a progress bar.

    Raises:
        MmlmError: What making the stage raised on a worker; nothing was written then.
        InputError: If Ray is not installed, or a number is out of range.
    """
    from data_tools.ray_stage import run_on_ray, stage_facts

    if options.actors < 1 or options.batch_size < 1 or options.gpus < 0:
        raise InputError(
            "--ray.actors and --ray.batch_size must be at least 1, --ray.gpus not negative.",
            advice="Leave out --ray.actors to work in this process.",
        )
    output.add_facts({"loaded": stage_facts(make_stage, gpus=options.gpus)})
    run_on_ray(
        make_stage,
        rows,
        output,
        actors=options.actors,
        batch_size=options.batch_size,
        gpus=options.gpus,
        progress=terminal.progress,
    )
