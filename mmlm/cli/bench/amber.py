"""``mmlm bench amber``: describe pictures and answer yes/no questions about them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.official import given_or_official
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from benchmarks.amber.data import Question

__all__ = ["COMMAND", "BenchAmber"]


@dataclass(frozen=True)
class BenchAmber(BenchOptions):
    """Options of ``mmlm bench amber``.

    Attributes:
        images: Folder of AMBER's 1,004 pictures (AMBER_1.jpg ...); by default where `mmlm data
            fetch amber-images` puts them. Questions and truth ship with mmlm.
        data: Folder `data` of the authors' repository, to use its questions instead.
        evaluation: `a`: everything; `g`: descriptions; `d`: yes/no questions, of which `de`:
            existence, `da`: attribute, `dr`: relation.
        count: Only the first pictures, for a quick look.
        suffix: What follows the yes/no questions; AMBER adds nothing.
        similarity: How words of descriptions are compared; part of the metric's name. `exact`:
            equal words; `spacy`: the authors' vectors (needs spaCy's en_core_web_lg).
        answers: How yes/no answers are read. `normalised`: by their first word; `raw`: bare
            `Yes` and `No` only, as the authors' script does.
    """

    images: Path | None = None
    data: Path | None = None
    evaluation: Literal["a", "g", "d", "de", "da", "dr"] = "a"
    count: int | None = None
    suffix: str = ""
    similarity: Literal["exact", "spacy"] = "exact"
    answers: Literal["normalised", "raw"] = "normalised"


def run(settings: BenchAmber, terminal: Terminal) -> int:
    """Asks AMBER's questions and scores the answers."""
    from benchmarks import amber
    from benchmarks.amber.words import similarity
    from benchmarks.stored import content_hash

    questions = _questions(settings)
    folder = _pictures(settings, questions)
    near = similarity(settings.similarity)  # refuses what is not installed before any work
    plan = Plan(
        benchmark="amber",
        scorer=f"amber/{near.name}/{settings.answers}",
        data={
            "questions": content_hash([question.facts() for question in questions]),
            "suffix": settings.suffix,
        },
        task=lambda: amber.task(questions, folder, suffix=settings.suffix),
        score=lambda lines: amber.score_stored(lines, near=near, answers=settings.answers),
        information={"images": str(folder.resolve()), "evaluation": settings.evaluation},
    )
    return run_plan(settings, terminal, plan)


def _questions(settings: BenchAmber) -> Sequence[Question]:
    """What is asked: the questions of the evaluation about the first pictures."""
    from benchmarks.amber.data import questions_of, read_questions

    if settings.count is not None and settings.count < 1:
        raise InputError(f"--count is {settings.count}.", advice="Ask for at least 1 picture.")
    questions = questions_of(read_questions(settings.data), settings.evaluation)
    pictures = list(dict.fromkeys(question.image for question in questions))[: settings.count]
    chosen = set(pictures)
    return [question for question in questions if question.image in chosen]


def _pictures(settings: BenchAmber, questions: Sequence[Question]) -> Path:
    """The folder of the pictures, after a look whether all are there."""
    folder = given_or_official("images", settings.images, "amber-images")
    wanted = dict.fromkeys(question.image for question in questions)
    missing = [name for name in wanted if not (folder / name).is_file()]
    if missing:
        raise InputError(
            f"{len(missing)} of {len(wanted)} pictures are missing in {str(folder)!r}, e.g. "
            f"{missing[0]}.",
            advice="Give the folder that holds AMBER_1.jpg and so on; where they come from: "
            "mmlm data list amber-images",
        )
    return folder


COMMAND = Command(
    summary="describe pictures and answer yes/no questions about them",
    settings=BenchAmber,
    run=run,
    example=(
        "mmlm bench amber --model llava-hf/llava-1.5-7b-hf --images AMBER/image\n"
        "mmlm bench amber --images AMBER/image --evaluation de --count 50"
    ),
)
