"""A stage as Ray Data actors: many GPUs on many machines, one output folder.

Every actor makes its own stage (and so loads its own models) and works on batches of records; what
it finds comes back to the process that called `run_on_ray`, which alone writes. So the output is
one set of files under one lock, resumed and merged like that of any other run, no file system needs
to be shared, and a worker that dies costs the batch it held: Ray gives it to another. The lines of
a record are some kilobytes against seconds of GPU time, so that one writer is enough.

Needs the extra ``ray`` (``pip install 'mmlm[ray]'``); everything else works without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from data_tools.records import Outcome, StageOutput
from data_tools.stages import Record, Stage, check_ids, pending, tracked
from mmlm.errors import InputError, MmlmError

__all__ = ["check_ray", "run_on_ray", "stage_facts"]

_STORE = 200 * 2**20  # bytes of Ray's object store on a machine of our own; results are small


def check_ray() -> None:
    """Makes sure that Ray can be imported, before any work.

    Raises:
        InputError: Says what to install.
    """
    if importlib.util.find_spec("ray") is None:
        raise InputError("Ray is not installed.", advice="pip install 'mmlm[ray]'")


class _Worker:
    """What an actor is: a stage, and batches of records as Ray hands them over.

    Records and outcomes travel as JSON text: as columns Arrow would unify their fields, and change
    what an empty list or a whole number is.
    """

    def __init__(self, make_stage: Callable[[], Stage]) -> None:
        self._stage = make_stage()

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[str]]:
        records = [json.loads(text) for text in batch["record"]]
        outcomes = [json.dumps(dataclasses.astuple(o)) for o in self._stage.process(records)]
        return {"outcome": outcomes}


def run_on_ray(
    make_stage: Callable[[], Stage],
    records: Sequence[Record],
    output: StageOutput,
    *,
    actors: int,
    batch_size: int = 8,
    gpus: float = 0,
    progress: bool = False,
) -> Counter[str]:
    """Runs a stage over what is not done yet, in actors; stores outcomes as they come back.

    Connects to the cluster of ``RAY_ADDRESS`` or to one that this process has joined already, and
    else starts Ray on this machine for the time of the call.

    Args:
        make_stage: Makes the stage inside an actor; what it refers to must be importable there.
        records: All records of the stage.
        output: Where the lines go; opened by this function. Shards and actors can be combined.
        actors: Number of actors; >= 1.
        batch_size: Records that an actor is given at once; a kill loses at most what actors hold.
        gpus: GPUs per actor, as Ray counts them (0.5: two share one).
        progress: Show a progress bar on standard error.

    Returns:
        How many records have which status, earlier sessions included.

    Raises:
        ValueError: If ``actors`` or ``batch_size`` is below 1 or ``gpus`` negative.
        InputError: If Ray is not installed.
    """
    if actors < 1 or batch_size < 1 or gpus < 0:
        raise ValueError(
            "actors and batch_size must be at least 1 and gpus not negative, got "
            f"{actors}, {batch_size}, {gpus}"
        )
    check_ray()
    check_ids(records, "The input")
    mine = sum(output.shard.owns(record["id"]) for record in records)
    with output, tracked(mine, progress) as advance:
        todo = pending(records, output)
        advance(mine - len(todo), "")
        if todo:
            for outcome in _outcomes(make_stage, todo, actors, batch_size, gpus):
                # A batch whose worker died behind its last record may come back a second time.
                if outcome.id not in output.done:
                    output.write([outcome])
                    advance(1, outcome.status)
    return Counter(output.done.values())


def _outcomes(
    make_stage: Callable[[], Stage],
    todo: Sequence[Record],
    actors: int,
    batch_size: int,
    gpus: float,
) -> Iterable[Outcome]:
    import ray.data

    with _cluster():
        ray.data.DataContext.get_current().enable_progress_bars = False
        rows = [{"record": json.dumps(record)} for record in todo]
        # One block per batch: outcomes come back after every batch, not at the end.
        blocks = -(-len(rows) // batch_size)
        table = ray.data.from_items(rows, override_num_blocks=blocks).map_batches(
            _Worker,
            fn_constructor_args=(make_stage,),
            batch_size=batch_size,
            num_gpus=gpus or None,
            compute=ray.data.ActorPoolStrategy(size=min(actors, blocks)),
        )
        for row in table.iter_rows():
            identifier, status, lines, seconds = json.loads(row["outcome"])
            yield Outcome(identifier, status, lines, seconds)


def stage_facts(make_stage: Callable[[], Any], *, gpus: float = 0) -> Any:
    """Makes a stage on a worker, as an actor will, and returns its ``facts``.

    For run records: what is known only after loading (a hash of the weights) must be compared
    before anything is written. It also finds out whether a worker can make the stage at all.

    Args:
        make_stage: As in `run_on_ray`; the stage has a property ``facts`` (JSON values).
        gpus: GPUs that making it takes.

    Raises:
        MmlmError: What making the stage raised on the worker.
        InputError: If Ray is not installed.
    """
    check_ray()
    import ray

    with _cluster():
        task = ray.remote(num_gpus=gpus)(_facts_of).remote(make_stage)
        try:
            return ray.get(task)
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, MmlmError):
                raise error.cause from None
            raise


def _facts_of(make_stage: Callable[[], Any]) -> Any:
    return make_stage().facts


@contextlib.contextmanager
def _cluster() -> Iterator[None]:
    """Ray, started for the time of the block if this process has not joined a cluster."""
    import ray

    if ray.is_initialized():
        yield
        return
    local = {} if "RAY_ADDRESS" in os.environ else {"object_store_memory": _STORE}
    ray.init(include_dashboard=False, log_to_driver=False, **local)
    try:
        yield
    finally:
        ray.shutdown()
