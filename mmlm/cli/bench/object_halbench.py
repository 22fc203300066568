"""``mmlm bench object-halbench``: describe COCO pictures in detail, count invented objects."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.halbench import ReadingOptions, scorer
from mmlm.cli.official import given_or_official
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.run import Task

__all__ = ["COMMAND", "BenchObjectHalbench"]


@dataclass(frozen=True, kw_only=True)
class BenchObjectHalbench(ReadingOptions, BenchOptions):
    """Options of ``mmlm bench object-halbench``.

    Attributes:
        data: The official question file, obj_halbench_300_with_image.jsonl; by default where
            `mmlm data fetch object-halbench` puts it.
        images: Folder of COCO's val2014 pictures; not needed if the question file holds them.
        count: Only the first questions, for a quick look.
    """

    data: Path | None = None
    images: Path | None = None
    count: int | None = None


def run(settings: BenchObjectHalbench, terminal: Terminal) -> int:
    """Asks the questions and scores the answers; a judge is asked only if one is named."""
    from benchmarks.object_halbench import files as halbench_files
    from mmlm.records import file_hash

    data = given_or_official("data", settings.data, "object-halbench")
    if settings.count is not None and settings.count < 1:
        raise InputError(f"--count is {settings.count}.", advice="Ask at least 1 question.")
    questions = halbench_files.read_questions(data)[: settings.count]
    folder = settings.folder("object-halbench")
    score = scorer(settings, terminal)
    if settings.images is not None:
        found = halbench_files.find_pictures(questions, settings.images)
    else:
        found = {}
        halbench_files.check_embedded(questions)

    def task() -> Task:
        pictures = found or halbench_files.unpack_pictures(questions, folder / "pictures")
        return halbench_files.task(questions, pictures)

    plan = Plan(
        benchmark="object-halbench",
        scorer="object-halbench",
        data={"questions": file_hash(data), "count": len(questions)},
        task=task,
        score=lambda lines: score(lines, folder / "answers.jsonl"),
        information={
            "annotations": [str(path) for path in settings.annotations],
            "references": [str(path) for path in settings.references],
        },
    )
    return run_plan(settings, terminal, plan)


COMMAND = Command(
    summary="describe COCO pictures in detail, count invented objects",
    settings=BenchObjectHalbench,
    run=run,
    example=(
        "mmlm data fetch object-halbench && mmlm bench object-halbench\n"
        "mmlm bench object-halbench --data obj_halbench_300_with_image.jsonl \\\n"
        "    --judge openai --judge.model gpt-3.5-turbo --phrases spacy"
    ),
)
