"""``mmlm data mia answer``: what the model says about the composed pictures."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from data_tools.mia.answer import AnswerSettings
from mmlm.cli.data.mia.common import StageOptions, open_output, report, run_step
from mmlm.cli.data.mia.model_stages import Opener, model_facts, open_for_images, run_of, total_of
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.options import ModelOptions, check_model_name

__all__ = ["COMMAND", "Answer", "answer_questions", "run"]


@dataclass(frozen=True)
class Answer:
    """Options of ``mmlm data mia answer``.

    Attributes:
        output: Folder of the run.
        model: The model.
        answer: How it answers.
        stage: Shard, and what to do with an earlier run.
    """

    output: Path
    model: ModelOptions = field(default_factory=ModelOptions)
    answer: AnswerSettings = field(default_factory=AnswerSettings)
    stage: StageOptions = field(default_factory=StageOptions)


def run(settings: Answer, terminal: Terminal) -> int:
    """Answers every question that has no answer yet.

    Raises:
        MmlmError: For everything that makes the run impossible, before any work.
    """
    counts = answer_questions(
        settings.output, settings.model, settings.answer, settings.stage, terminal
    )
    return report(terminal, settings.output, {"answer": counts})


def answer_questions(
    root: Path,
    model: ModelOptions,
    settings: AnswerSettings,
    stage: StageOptions,
    terminal: Terminal,
    opener: Opener = open_for_images,
) -> Counter[str]:
    """Runs the stage; loads the model only if there is something left to answer.

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
    from data_tools.mia.answer import AnswerStage
    from data_tools.mia.records import ANSWER, COMPOSE, joined
    from mmlm.runner import fingerprint
    from mmlm.sharding import this_shard

    check_model_name(model.id)
    facts = {
        "instructions": run_of(root, COMPOSE),
        "model": model_facts(model),
        "answer": settings.facts,
    }
    records = joined(root, (COMPOSE,), this_shard(stage.shard))
    output = open_output(root, ANSWER, facts, stage, total=total_of(root, (COMPOSE,)))
    if all(record["id"] in output.done for record in records):
        return Counter(output.done.values())
    loaded, processor = opener(model, terminal, settings.layer, measured=settings.attention)
    output.add_facts({"weights": fingerprint(loaded)})
    work = AnswerStage(loaded, processor, root, settings, model.id, records)
    return run_step(ANSWER, work, records, output, terminal)


COMMAND = Command(
    summary="let a model answer the composed questions (greedy)",
    settings=Answer,
    run=run,
    example=(
        "mmlm data mia answer --output mia\n"
        "mmlm data mia answer --output mia --model llava-hf/llava-1.5-7b-hf --shard 0/8"
    ),
)
