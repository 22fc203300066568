"""``mmlm bench pope``: ask whether objects are in pictures, present and absent ones."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.pictures import DataOptions, Source, find
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.pope_questions import Question

__all__ = ["COMMAND", "BenchPope"]


@dataclass(frozen=True)
class BenchPope(BenchOptions):
    """Options of ``mmlm bench pope``.

    Attributes:
        questions: A question file in POPE's format, e.g. coco_pope_random.json; needs --images.
            Without one, the world's questions, or questions built from --annotations.
        suffix: What follows the question. `llava`: "Answer the question using a single word or
            phrase."; `vcd`: "Please answer this question with one word."
        parser: How answers are read as yes or no; part of the metric's name.
        data: Which pictures.
    """

    questions: tuple[Path, ...] = field(default=(), metadata={"alias": "--questions"})
    suffix: Literal["none", "llava", "vcd"] = "none"
    parser: Literal["strict", "official", "opera", "vcd", "lmms-eval", "vlmevalkit"] = "strict"
    data: DataOptions = field(default_factory=DataOptions)


def run(settings: BenchPope, terminal: Terminal) -> int:
    """Asks yes/no questions and scores POPE."""
    from benchmarks import pope, run, tables

    asked: dict[str, Sequence[Question]] = {}
    if settings.questions:
        asked, source = _question_files(settings.questions), _bare(settings)
    else:
        source = find(settings.data, settings.folder("pope") / "pictures")
    suffix = pope.PROMPT_SUFFIXES[settings.suffix]

    def task() -> run.Task:
        drawn = source.draw(terminal.progress)
        return run.pope_task(
            asked or drawn.questions(),
            drawn.folder,
            suffix=suffix,
            version_name=source.version,
            parser=settings.parser,
        )

    plan = Plan(
        benchmark="pope",
        scorer=f"pope/{settings.parser}",
        data={**source.description, "suffix": suffix},
        task=task,
        score=lambda lines: pope.score_stored(lines, settings.parser)[0],
        information=source.truth_files(),
        table=tables.pope_table,
    )
    return run_plan(settings, terminal, plan)


def _question_files(paths: Sequence[Path]) -> dict[str, Sequence[Question]]:
    """Question files by split: recognised, or named in the file's name."""
    from benchmarks import pope

    splits: dict[str, Sequence[Question]] = {}
    for path in paths:
        questions = pope.read_questions(path)
        known = pope.recognise(questions)
        named = re.search("|".join(pope.KINDS), path.name)
        split = known[1] if known else named[0] if named else path.name.partition(".")[0]
        if split in splits:
            raise InputError(
                f"Two question files are of the kind {split!r}.",
                advice="Give one file of each kind: random, popular, adversarial.",
            )
        splits[split] = questions
    return splits


def _bare(settings: BenchPope) -> Source:
    """A folder of pictures about which question files say everything."""
    from mmlm.records import file_hash

    folder = settings.data.images
    if folder is None or not folder.is_dir():
        raise InputError(
            f"--questions needs the folder of the pictures; --images is {str(folder or '')!r}.",
            advice="Give --images FOLDER.",
        )
    hashes = {path.name: file_hash(path) for path in settings.questions}
    return Source(str(folder), {"questions": hashes}, "", "custom", folder, 0)


COMMAND = Command(
    summary="ask whether objects are in pictures, present and absent ones",
    settings=BenchPope,
    run=run,
    example=(
        "mmlm bench pope --output runs/pope\n"
        "mmlm bench pope --model llava-hf/llava-1.5-7b-hf --suffix llava --images val2014 \\\n"
        "    --questions coco_pope_random.json --questions coco_pope_popular.json"
    ),
)
