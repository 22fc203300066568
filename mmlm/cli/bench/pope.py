"""``mmlm bench pope``: ask whether objects are in pictures, present and absent ones."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.official import given_or_official
from mmlm.cli.pictures import DataOptions, Source, find
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.pope.questions import Question
    from benchmarks.run import Task

__all__ = ["COMMAND", "BenchPope"]


@dataclass(frozen=True)
class BenchPope(BenchOptions):
    """Options of ``mmlm bench pope``.

    Attributes:
        version: `coco-2023-11`, `coco-legacy`, `aokvqa`, `gqa`: the authors' 500 pictures and their
            questions, which ship with mmlm; --images is the folder of COCO val2014 (or of GQA),
            by default where `mmlm data fetch coco-val2014` (or gqa-images) puts it. `own`: the
            world's questions, or questions built from --annotations.
        questions: A question file in POPE's format, e.g. coco_pope_random.json; needs --images.
        chat: POPE-Chat: ask all questions about a picture in one conversation.
        suffix: What follows the question. `llava`: "Answer the question using a single word or
            phrase."; `vcd`: "Please answer this question with one word."
        parser: How answers are read as yes or no; part of the metric's name.
        data: Which pictures.
    """

    version: Literal["own", "coco-2023-11", "coco-legacy", "aokvqa", "gqa"] = "own"
    questions: tuple[Path, ...] = field(default=(), metadata={"alias": "--questions"})
    chat: bool = False
    suffix: Literal["none", "llava", "vcd"] = "none"
    parser: Literal["strict", "official", "opera", "vcd", "lmms-eval", "vlmevalkit"] = "strict"
    data: DataOptions = field(default_factory=DataOptions)


def run(settings: BenchPope, terminal: Terminal) -> int:
    """Asks yes/no questions and scores POPE."""
    from benchmarks import pope, tables

    asked, source = _asked(settings)
    suffix = pope.PROMPT_SUFFIXES[settings.suffix]

    def task() -> Task:
        drawn = source.draw(terminal.progress)
        return pope.task(
            asked or drawn.questions(),
            drawn.folder,
            suffix=suffix,
            version=source.version,
            parser=settings.parser,
            chat=settings.chat,
        )

    data = {**source.description, "suffix": suffix}
    if settings.chat:
        data["chat"] = True
    plan = Plan(
        benchmark="pope",
        scorer=f"pope/{settings.parser}",
        data=data,
        task=task,
        score=lambda lines: pope.score_stored(lines, settings.parser),
        information=source.truth_files(),
        table=tables.pope_table,
    )
    return run_plan(settings, terminal, plan)


def _asked(settings: BenchPope) -> tuple[dict[str, Sequence[Question]], Source]:
    """The questions of --version or --questions; none for those that come with the pictures."""
    if settings.version == "own" and not settings.questions:
        return {}, find(settings.data, settings.folder("pope") / "pictures")
    if settings.version != "own" and settings.questions:
        raise InputError("--version and --questions are both given.", advice="Give one of the two.")
    option = "--questions" if settings.questions else "--version"
    folder = settings.data.images
    if folder is None and not settings.questions:
        name = "gqa-images" if settings.version == "gqa" else "coco-val2014"
        folder = given_or_official("images", None, name)
    if folder is None or not folder.is_dir():
        raise InputError(
            f"{option} needs the folder of the pictures; --images is {str(folder or '')!r}.",
            advice="Give --images FOLDER.",
        )
    for name in ("annotations", "references"):
        if getattr(settings.data, name):
            raise InputError(
                f"--{name} is given with {option}, which says everything.",
                advice=f"Leave out --{name}.",
            )
    if settings.questions:
        return _question_files(settings.questions), _bare(settings, folder)
    return _published(settings, folder)


def _published(settings: BenchPope, folder: Path) -> tuple[dict[str, Sequence[Question]], Source]:
    """The authors' questions, or those about some of their pictures."""
    from benchmarks import pope
    from benchmarks.pope.questions import digest

    asked: dict[str, Sequence[Question]] = dict(pope.published(settings.version))
    images = list(dict.fromkeys(q.image for questions in asked.values() for q in questions))
    version, count = settings.version, settings.data.count
    if count is not None:
        if not 1 <= count <= len(images):
            raise InputError(
                f"--count is {count}; {version} has {len(images)} pictures.",
                advice=f"Ask for 1 to {len(images)}, or leave --count out.",
            )
        chosen = set(random.Random(settings.data.seed).sample(images, count))
        asked = {
            split: [question for question in questions if question.image in chosen]
            for split, questions in asked.items()
        }
        if count < len(images):
            version = f"{version}-{count}of{len(images)}"
        images = [image for image in images if image in chosen]
    if missing := [image for image in images if not (folder / image).is_file()]:
        home = "GQA" if settings.version == "gqa" else "COCO val2014"
        raise InputError(
            f"{len(missing)} of {len(images)} pictures are not in {str(folder)!r}, "
            f"e.g. {missing[0]}.",
            advice=f"Give the folder of the pictures of {home} with --images.",
        )
    hashes = {split: digest(questions) for split, questions in asked.items()}
    description = {"version": version, "questions": hashes}
    return asked, Source(str(folder), description, "", version, folder, len(images))


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


def _bare(settings: BenchPope, folder: Path) -> Source:
    """A folder of pictures about which question files say everything."""
    from mmlm.records import file_hash

    hashes = {path.name: file_hash(path) for path in settings.questions}
    return Source(str(folder), {"questions": hashes}, "", "custom", folder, 0)


COMMAND = Command(
    summary="ask whether objects are in pictures, present and absent ones",
    settings=BenchPope,
    run=run,
    example=(
        "mmlm bench pope --output runs/pope\n"
        "mmlm bench pope --model llava-hf/llava-1.5-7b-hf --suffix llava --images val2014 \\\n"
        "    --version coco-2023-11\n"
        "mmlm bench pope --chat --parser opera --images val2014 --version coco-legacy"
    ),
)
