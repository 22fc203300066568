"""``mmlm data mia score``: where the model looked while it answered, and how sure it was."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.mia.score import ScoreSettings
from mmlm.cli.data.mia.common import StageOptions, open_output, report, run_step
from mmlm.cli.data.mia.model_stages import Opener, model_facts, open_for_images, run_of, total_of
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.options import ModelOptions, check_model_name

__all__ = ["COMMAND", "Score", "run", "score_answers"]


@dataclass(frozen=True)
class Score:
    """Options of ``mmlm data mia score``.

    Attributes:
        output: Folder of the run.
        model: The model that answered; not loaded where everything was measured at that time.
        score: How answers are scored.
        stage: Shard, and what to do with an earlier run.
    """

    output: Path
    model: ModelOptions = field(default_factory=ModelOptions)
    score: ScoreSettings = field(default_factory=ScoreSettings)
    stage: StageOptions = field(default_factory=StageOptions)


def run(settings: Score, terminal: Terminal) -> int:
    """Scores every answer that has no score yet.

    Raises:
        MmlmError: For everything that makes the run impossible, before any work.
    """
    counts = score_answers(
        settings.output, settings.model, settings.score, settings.stage, terminal
    )
    return report(terminal, settings.output, {"score": counts})


def score_answers(
    root: Path,
    model: ModelOptions,
    settings: ScoreSettings,
    stage: StageOptions,
    terminal: Terminal,
    opener: Opener = open_for_images,
) -> Counter[str]:
    """Runs the stage; loads the model only if there is something left to measure with it.

    Args:
        root: Folder of the run.
        model: The model.
        settings: Settings of the stage.
        stage: Shard, and what to do with an earlier run.
        terminal: Where to write.
        opener: What loads the model; `mmlm data mia run` gives both stages the same one.

    Returns:
        Records per status.
    """
    from data_tools.mia.records import ANSWER, COMPOSE, SCORE, joined
    from data_tools.mia.score import ScoreStage, check_answers
    from mmlm.runner import fingerprint
    from mmlm.sharding import this_shard

    facts = {"answers": run_of(root, ANSWER), "score": settings.facts}
    if settings.needs_model:
        check_model_name(model.id)
        facts["model"] = model_facts(model)
    records = joined(root, (COMPOSE, ANSWER), this_shard(stage.shard))
    check_answers(records, settings)
    output = open_output(root, SCORE, facts, stage, total=total_of(root, (COMPOSE, ANSWER)))
    if all(record["id"] in output.done for record in records):
        return Counter(output.done.values())
    loaded = processor = None
    if settings.needs_model:
        loaded, processor = opener(model, terminal, settings.layer, measured=True)
        output.add_facts({"weights": fingerprint(loaded)})
    work = ScoreStage(loaded, processor, root, settings, records)
    return run_step(SCORE, work, records, output, terminal)


COMMAND = Command(
    summary="attention on the picture that was meant, and perplexity, of every answer",
    settings=Score,
    run=run,
    example=(
        "mmlm data mia score --output mia\n"
        "mmlm data mia score --output mia --score.perplexity answer"
    ),
)
