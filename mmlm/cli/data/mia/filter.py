"""``mmlm data mia filter`` and ``refilter``: which answers become pairs."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from data_tools.mia.filters import Thresholds
from mmlm.cli.data.mia.common import StageOptions, open_output, report, run_step
from mmlm.cli.data.mia.model_stages import run_of, total_of
from mmlm.cli.frame import Command, Terminal
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections import Counter

__all__ = ["FILTER", "REFILTER", "Filter", "Refilter", "filter_answers", "run", "run_again"]


@dataclass(frozen=True)
class Filter:
    """Options of ``mmlm data mia filter``.

    Attributes:
        output: Folder of the run.
        filter: The thresholds.
        stage: Shard, and what to do with an earlier run.
    """

    output: Path
    filter: Thresholds = field(default_factory=Thresholds)
    stage: StageOptions = field(default_factory=StageOptions)


@dataclass(frozen=True)
class Refilter:
    """Options of ``mmlm data mia refilter``.

    Attributes:
        output: Folder of the run.
        name: What the new selection is called: it goes to OUTPUT/filter-NAME and
            OUTPUT/pairs-NAME.jsonl; letters, digits, "-" and "_".
        seed: Seed of the order of the pairs.
        filter: The thresholds.
        overwrite: Throw away an earlier selection of this name.
    """

    output: Path
    name: str
    seed: int = 0
    filter: Thresholds = field(default_factory=Thresholds)
    overwrite: bool = False


def run(settings: Filter, terminal: Terminal) -> int:
    """Filters.

    Raises:
        InputError: If a stage before is missing, the table lacks an entry, or the output is
            another run's.
    """
    counts = filter_answers(settings.output, settings.filter, settings.stage, terminal)
    return report(terminal, settings.output, {"filter": counts})


def filter_answers(
    root: Path, thresholds: Thresholds, stage: StageOptions, terminal: Terminal
) -> Counter[str]:
    """Runs the stage.

    Returns:
        Records per filter that they did not pass; ``ok`` are the pairs.
    """
    from data_tools.mia.filters import Filter as FilterStage
    from data_tools.mia.filters import check_numbers, records_to_filter
    from data_tools.mia.records import ANSWER, COMPOSE, SCORE
    from data_tools.mia.records import FILTER as STEP
    from mmlm.sharding import this_shard

    records = records_to_filter(root, this_shard(stage.shard))
    check_numbers(records, thresholds)
    facts = {"scores": run_of(root, SCORE), "filter": dataclasses.asdict(thresholds)}
    total = total_of(root, (COMPOSE, ANSWER, SCORE))
    output = open_output(root, STEP, facts, stage, total=total)
    return run_step(STEP, FilterStage(thresholds), records, output, terminal)


def run_again(settings: Refilter, terminal: Terminal) -> int:
    """Applies other thresholds to what was answered and scored before; needs no model.

    Raises:
        InputError: If there is no filter stage, the table lacks an entry, or the name is taken.
    """
    from data_tools.mia.filters import Filter as FilterStage
    from data_tools.mia.filters import check_numbers, records_to_refilter
    from data_tools.mia.merging import write_pairs
    from data_tools.mia.records import FILTER as STEP

    if not re.fullmatch(r"[\w-]+", settings.name):
        raise InputError(
            f"A selection cannot be called {settings.name!r}.",
            advice='Use letters, digits, "-" and "_".',
        )
    root = settings.output
    records = records_to_refilter(root)
    check_numbers(records, settings.filter)
    step = STEP._replace(name=f"{STEP.name}-{settings.name}")
    options = StageOptions(shard="0/1", overwrite=settings.overwrite)
    facts = {"filter": dataclasses.asdict(settings.filter)}
    output = open_output(root, step, facts, options, total=len(records))
    counts = run_step(step, FilterStage(settings.filter), records, output, terminal)
    path = root / f"pairs-{settings.name}.jsonl"
    pairs = write_pairs(root / step.name, path, settings.seed)
    terminal.note(f"{pairs} pairs in {path}")
    return report(terminal, root, {STEP.name: counts})


FILTER = Command(
    summary="which answers become pairs, by attention, perplexity and likeness",
    settings=Filter,
    run=run,
    example="mmlm data mia filter --output mia",
)
REFILTER = Command(
    summary="other thresholds for what was answered before, without a model",
    settings=Refilter,
    run=run_again,
    example="mmlm data mia refilter --output mia --name strict --filter.ppl 1.3",
)
