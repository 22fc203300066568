"""``mmlm bench mme``: MME's hallucination subset."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.official import given_or_official

__all__ = ["COMMAND", "BenchMme"]


@dataclass(frozen=True)
class BenchMme(BenchOptions):
    """Options of ``mmlm bench mme``.

    Attributes:
        data: The official folder with the categories existence, count, position and color;
            pictures and questions are both in it. By default where `mmlm data fetch mme` puts it.
        prompt: `official`: the questions as they are, ending in "Please answer yes or no.";
            `llava`: "Answer the question using a single word or phrase." instead.
    """

    data: Path | None = None
    prompt: Literal["official", "llava"] = "official"


def run(settings: BenchMme, terminal: Terminal) -> int:
    """Asks the questions and scores them."""
    from benchmarks import mme
    from benchmarks.stored import content_hash
    from mmlm.records import file_hash

    folder = given_or_official("data", settings.data, "mme")
    questions = mme.read_questions(folder)
    asked = [(question.id, question.text, question.label) for question in questions]
    pictures = {question.image_name: question.path for question in questions}
    plan = Plan(
        benchmark="mme",
        scorer="mme/hallucination",
        data={
            "questions": content_hash(asked),
            "pictures": content_hash({name: file_hash(path) for name, path in pictures.items()}),
            "prompt": settings.prompt,
        },
        task=lambda: mme.task(questions, settings.prompt),
        score=mme.score_stored,
        information={"folder": str(folder)},
    )
    return run_plan(settings, terminal, plan)


COMMAND = Command(
    summary="two questions per picture about existence, count, position and color",
    settings=BenchMme,
    run=run,
    example=(
        "mmlm bench mme --model llava-hf/llava-1.5-7b-hf --data MME_Benchmark_release_version"
    ),
)
