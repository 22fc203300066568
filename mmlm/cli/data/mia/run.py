"""``mmlm data mia run``: all stages of MIA-DPO after each other."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data_tools.mia.answer import AnswerSettings
from data_tools.mia.filters import Thresholds
from data_tools.mia.planning import ComposeSettings
from data_tools.mia.score import ScoreSettings
from mmlm.cli.data.mia.answer import answer_questions
from mmlm.cli.data.mia.common import StageOptions, report
from mmlm.cli.data.mia.compose import SourceOptions, compose
from mmlm.cli.data.mia.filter import filter_answers
from mmlm.cli.data.mia.merge import merge_run
from mmlm.cli.data.mia.model_stages import Opener, open_for_images
from mmlm.cli.data.mia.score import score_answers
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.options import ModelOptions

__all__ = ["COMMAND", "OneModel", "Run", "run"]


@dataclass(frozen=True)
class Run:
    """Options of ``mmlm data mia run``.

    Attributes:
        output: Folder of the run; if stages are there, they go on where they stopped.
        source: Where questions about one picture come from.
        compose: How they become questions about several.
        model: The model that answers and whose attention is measured.
        answer: How it answers.
        score: How answers are scored.
        filter: The thresholds.
        stage: Shard, and what to do with an earlier run. Shards are put together with
            `mmlm data mia merge` when all are finished.
        seed: Seed of the order of the pairs.
    """

    output: Path
    source: SourceOptions = field(default_factory=SourceOptions)
    compose: ComposeSettings = field(default_factory=ComposeSettings)
    model: ModelOptions = field(default_factory=ModelOptions)
    answer: AnswerSettings = field(default_factory=AnswerSettings)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    filter: Thresholds = field(default_factory=Thresholds)
    stage: StageOptions = field(default_factory=StageOptions)
    seed: int = 0


class OneModel:
    """Opens the model when the first stage needs it, and gives the same one to the next.

    Args:
        open: What opens it; `open_for_images`.
    """

    def __init__(self, open: Opener = open_for_images) -> None:
        self._open = open
        self._opened: tuple[Any, Any] | None = None

    def __call__(
        self, options: ModelOptions, terminal: Terminal, layer: int | None, *, measured: bool
    ) -> tuple[Any, Any]:
        """The model and its processor; see `open_for_images`."""
        if self._opened is None:
            # Measured or not: what scoring will need is checked before anything is answered.
            self._opened = self._open(options, terminal, layer, measured=True)
        return self._opened


def run(settings: Run, terminal: Terminal) -> int:
    """Runs all stages; those that are finished are skipped.

    Raises:
        MmlmError: For everything that makes a stage impossible, before it starts.
    """
    from mmlm.sharding import this_shard

    root, stage = settings.output, settings.stage
    model = OneModel()
    counts = {
        "compose": compose(root, settings.source, settings.compose, stage, terminal),
        "answer": answer_questions(root, settings.model, settings.answer, stage, terminal, model),
        "score": score_answers(root, settings.model, settings.score, stage, terminal, model),
        "filter": filter_answers(root, settings.filter, stage, terminal),
    }
    if this_shard(stage.shard).count == 1:
        merge_run(root, settings.seed, terminal)
    else:
        terminal.note(f"When all shards are finished: mmlm data mia merge {root}")
    return report(terminal, root, counts)


COMMAND = Command(
    summary="all stages: compose, answer, score, filter, merge",
    settings=Run,
    run=run,
    example=(
        "mmlm data mia run --config data/world_mia --output mia\n"
        "mmlm data mia run --config data/mia_llava15 --sources llava_v1_5_mix665k.json \\\n"
        "    --source.images data/llava --output mia --shard 0/8"
    ),
)
