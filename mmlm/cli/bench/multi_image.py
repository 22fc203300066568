"""``mmlm bench mmmu``, ``blink``, ``mantis``, ``nlvr2``, ``mvbench``: several pictures at once."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from benchmarks.base import Scores
    from benchmarks.multi_image.rows import Pictures
    from benchmarks.run import Task

__all__ = ["COMMANDS", "BenchBlink", "BenchMantis", "BenchMmmu", "BenchMvbench", "BenchNlvr2"]


@dataclass(frozen=True)
class MultiImageOptions(BenchOptions):
    """Options of every benchmark with several pictures.

    Attributes:
        data: The data set: a folder with its parquet files, one written by `save_to_disk`, or
            JSON; or one such file. By default what `mmlm data fetch` brought.
        images: Where pictures and clips are that the data set only names; by default beside it.
        count: Only the first questions, for a quick look.
    """

    data: Path | None = None
    images: Path | None = None
    count: int | None = None


@dataclass(frozen=True)
class BenchMmmu(MultiImageOptions):
    """Options of ``mmlm bench mmmu``.

    Attributes:
        split: `validation` (900 questions), `dev`, or `test`, whose answers are secret.
    """

    split: Literal["validation", "dev", "test"] = "validation"


@dataclass(frozen=True)
class BenchBlink(MultiImageOptions):
    """Options of ``mmlm bench blink``.

    Attributes:
        split: `val` (1,901 questions), or `test`, whose answers are secret.
        parser: How a reply is read; part of the metric's name. `first-letter`: its first letter,
            even of a word; `stated-letter`: lmms-eval 0.7.3.
    """

    split: Literal["val", "test"] = "val"
    parser: Literal["first-letter", "stated-letter"] = "first-letter"


@dataclass(frozen=True)
class BenchMantis(MultiImageOptions):
    """Options of ``mmlm bench mantis``. Greedy by default, where lmms-eval samples."""


@dataclass(frozen=True)
class BenchNlvr2(MultiImageOptions):
    """Options of ``mmlm bench nlvr2``.

    Attributes:
        split: `test1` (6,967 examples) or `dev`.
        prompt: Part of the metric's name. `true-false`: answer True or False; `choice`: A or B.
    """

    split: Literal["test1", "dev"] = "test1"
    prompt: Literal["true-false", "choice"] = "true-false"


@dataclass(frozen=True)
class BenchMvbench(MultiImageOptions):
    """Options of ``mmlm bench mvbench``.

    Attributes:
        frames: How many frames stand for a clip; part of the metric's name. The authors take 8
            or 16.
        parser: How a reply is read; part of the metric's name. `first-letter`: its first letter;
            `lmms-eval`: the first single letter.
    """

    frames: int = 8
    parser: Literal["first-letter", "lmms-eval"] = "first-letter"


def run_mmmu(settings: BenchMmmu, terminal: Terminal) -> int:
    """Asks MMMU's questions and scores the answers."""
    from benchmarks.multi_image import mmmu

    def make(data: Path, pictures: Pictures) -> Task:
        questions = mmmu.read_questions(data, pictures, settings.split)
        return mmmu.task(questions[: settings.count], settings.split)

    return _run("mmmu", settings, terminal, make, mmmu.score_stored)


def run_blink(settings: BenchBlink, terminal: Terminal) -> int:
    """Asks BLINK's questions and scores the answers."""
    from benchmarks.multi_image import blink

    def make(data: Path, pictures: Pictures) -> Task:
        questions = blink.read_questions(data, pictures, settings.split)
        return blink.task(questions[: settings.count], settings.split, settings.parser)

    def score(lines: Sequence[Mapping[str, Any]]) -> Scores:
        return blink.score_stored(lines, settings.parser)

    return _run("blink", settings, terminal, make, score)


def run_mantis(settings: BenchMantis, terminal: Terminal) -> int:
    """Asks Mantis-Eval's questions and scores the answers."""
    from benchmarks.multi_image import mantis

    def make(data: Path, pictures: Pictures) -> Task:
        return mantis.task(mantis.read_questions(data, pictures)[: settings.count])

    return _run("mantis", settings, terminal, make, mantis.score_stored)


def run_nlvr2(settings: BenchNlvr2, terminal: Terminal) -> int:
    """Asks whether NLVR2's sentences are true and scores the answers."""
    from benchmarks.multi_image import nlvr2

    def make(data: Path, pictures: Pictures) -> Task:
        questions = nlvr2.read_questions(data, pictures, settings.split, settings.prompt)
        return nlvr2.task(questions[: settings.count], settings.split, settings.prompt)

    return _run("nlvr2", settings, terminal, make, nlvr2.score_stored)


def run_mvbench(settings: BenchMvbench, terminal: Terminal) -> int:
    """Asks MVBench's questions and scores the answers."""
    from benchmarks.multi_image import mvbench

    if settings.frames < 1:
        raise InputError(f"--frames is {settings.frames}.", advice="Ask for at least 1 frame.")

    def make(data: Path, pictures: Pictures) -> Task:
        questions = mvbench.read_questions(data, pictures, frames=settings.frames)
        return mvbench.task(questions[: settings.count], settings.parser)

    def score(lines: Sequence[Mapping[str, Any]]) -> Scores:
        return mvbench.score_stored(lines, settings.parser)

    return _run("mvbench", settings, terminal, make, score)


def _run(
    name: str,
    settings: MultiImageOptions,
    terminal: Terminal,
    make: Callable[[Path, Pictures], Task],
    score: Callable[[Sequence[Mapping[str, Any]]], Scores],
) -> int:
    """What the five commands share: the data, its pictures, the plan."""
    from benchmarks.multi_image.questions import digest
    from benchmarks.multi_image.rows import Pictures
    from benchmarks.official import locate

    data, images = settings.data or locate(name), settings.images
    if not data.exists():
        raise InputError(f"There is no --data {str(data)!r}.", advice=f"mmlm data fetch {name}")
    if images is not None and not images.is_dir():
        raise InputError(f"--images {str(images)!r} is no folder.", advice="Check the path.")
    if settings.count is not None and settings.count < 1:
        raise InputError(f"--count is {settings.count}.", advice="Ask at least 1 question.")
    pictures = Pictures(settings.folder(name) / "pictures", images)
    task = make(data, pictures)
    pictures.check()
    plan = Plan(
        benchmark=name,
        scorer=task.metric,
        data={"questions": digest(task)},
        task=lambda: task,
        score=score,
        information={"source": str(data)},
    )
    return run_plan(settings, terminal, plan)


def _command(summary: str, settings: type, run: Any, example: str) -> Command:
    return Command(summary=summary, settings=settings, run=run, example=example)


COMMANDS = {
    "mmmu": _command(
        "college questions with pictures in the text",
        BenchMmmu,
        run_mmmu,
        "mmlm data fetch mmmu\nmmlm bench mmmu --model Qwen/Qwen2.5-VL-7B-Instruct",
    ),
    "blink": _command(
        "what people see at a glance, in fourteen tasks",
        BenchBlink,
        run_blink,
        "mmlm bench blink --data BLINK --parser stated-letter",
    ),
    "mantis": _command(
        "questions about several pictures (Mantis-Eval)",
        BenchMantis,
        run_mantis,
        "mmlm bench mantis --data Mantis-Eval",
    ),
    "nlvr2": _command(
        "is a sentence about two photographs true?",
        BenchNlvr2,
        run_nlvr2,
        "mmlm bench nlvr2 --data nlvr2/data/test1.json --images nlvr2/images",
    ),
    "mvbench": _command(
        "questions about short clips, frames as pictures",
        BenchMvbench,
        run_mvbench,
        "mmlm bench mvbench --data MVBench/json --images MVBench/video --frames 16",
    ),
}
