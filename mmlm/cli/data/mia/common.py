"""What the commands of ``mmlm data mia`` share: how a stage is run, resumed and reported."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, SOME_FAILED, Terminal

if TYPE_CHECKING:
    from data_tools.mia.records import Step
    from data_tools.records import StageOutput
    from data_tools.stages import Stage

__all__ = ["StageOptions", "open_output", "report", "run_step"]

TOLERATED = 0.2
"""Up to this share of records may fail before the exit code says so."""
NO_FAILURES = ("ok", "long_answer", "empty_response")
"""Statuses of records that were done with as they should be, though some give no pair."""


@dataclass(frozen=True)
class StageOptions:
    """How a stage treats its output.

    Attributes:
        shard: `i/n`, i from 0 to n-1: only the records whose crc32(id) mod n is i. Under
            `accelerate launch` or `torchrun` every process takes its part by itself. Put the parts
            together with `mmlm data mia merge`.
        overwrite: Throw away what another run left.
        resume_anyway: Go on although the settings are not those of the run that began.
    """

    shard: str = field(default="", metadata={"alias": "--shard"})
    overwrite: bool = field(default=False, metadata={"alias": "--overwrite"})
    resume_anyway: bool = field(default=False, metadata={"alias": "--resume_anyway"})


def open_output(
    root: Path,
    step: Step,
    run: Mapping[str, Any],
    options: StageOptions,
    total: int | None = None,
) -> StageOutput:
    """The output of a stage, checked; nothing is written yet.

    Args:
        root: OUT.
        step: The stage.
        run: What determines its lines.
        options: Shard, overwrite, resume_anyway.
        total: Number of records of all shards, if it is known.

    Raises:
        InputError: If the folder belongs to another run.
    """
    from data_tools.records import StageOutput
    from mmlm.sharding import this_shard

    return StageOutput(
        root / step.name,
        {"command": f"data mia {step.name}", **run},
        step.kinds,
        this_shard(options.shard),
        total=total,
        overwrite=options.overwrite,
        resume_anyway=options.resume_anyway,
    )


def run_step(
    step: Step,
    stage: Stage,
    records: Sequence[Mapping[str, Any]],
    output: StageOutput,
    terminal: Terminal,
) -> Counter[str]:
    """Runs a stage over what is not done yet, and says how it went.

    Returns:
        Records per status, earlier sessions included.
    """
    from data_tools.stages import run_stage

    counts = run_stage(stage, records, output, progress=terminal.progress)
    others = ", ".join(f"{count} {status}" for status, count in sorted(counts.items()))
    terminal.note(f"{step.name}: {counts.total()} records ({others or 'none'}) in {output.folder}")
    return counts


def report(terminal: Terminal, root: Path, counts: Mapping[str, Counter[str]]) -> int:
    """Emits the counts of one or several stages as JSON, and returns the exit code.

    Args:
        terminal: Where to.
        root: OUT.
        counts: Records per status, by stage. A filter's statuses are no failures.

    Returns:
        ``SOME_FAILED`` if more than a fifth of the records of a stage failed, else ``DONE``.
    """
    from data_tools.mia.records import FILTER

    if terminal.json:
        terminal.emit({"output": str(root), "stages": {k: dict(v) for k, v in counts.items()}})
    for name, statuses in counts.items():
        failed = statuses.total() - sum(statuses[status] for status in NO_FAILURES)
        if name != FILTER.name and failed > TOLERATED * statuses.total():
            terminal.note(f"{failed} of {statuses.total()} records failed in {name}.")
            return SOME_FAILED
    return DONE
