"""``mmlm bench mmbench``: single choice with the options in every cyclic order."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.mmbench.files import Edition

__all__ = ["COMMAND", "BenchMmbench", "edition_of"]


@dataclass(frozen=True)
class BenchMmbench(BenchOptions):
    """Options of ``mmlm bench mmbench``.

    Attributes:
        data: The official table, e.g. MMBench_DEV_EN_V11.tsv; the pictures are in it. By default
            that one, if `mmlm data fetch mmbench-dev-en-v11` brought it.
        way: `circular`: every cyclic order of the options is asked and must be right; `vanilla`:
            only the first one, several points higher. Part of the metric's name.
        edition: Version, split and language as in `v1.1-dev-en`, if the file's name does not say.
    """

    data: Path | None = None
    way: Literal["circular", "vanilla"] = "circular"
    edition: str = ""


def run(settings: BenchMmbench, terminal: Terminal) -> int:
    """Asks MMBench's questions and scores the answers."""
    from benchmarks import mmbench
    from benchmarks.multi_image.questions import digest
    from benchmarks.multi_image.rows import Pictures
    from benchmarks.official import locate

    data = settings.data or locate("mmbench-dev-en-v11")
    edition = edition_of(data, settings.edition)
    pictures = Pictures(settings.folder("mmbench") / "pictures")
    problems = mmbench.read_problems(data, pictures, settings.way)
    task = mmbench.task(problems, edition, settings.way)
    plan = Plan(
        benchmark="mmbench",
        scorer=task.metric,
        data={"questions": digest(task)},
        task=lambda: task,
        score=mmbench.score_stored,
        information={"source": str(data)},
    )
    return run_plan(settings, terminal, plan)


def edition_of(path: Path, given: str) -> Edition:
    """The edition that was named, or that the file's name tells.

    Raises:
        InputError: If there is neither.
    """
    from benchmarks.mmbench.files import Edition, recognise

    parts = given.split("-")
    allowed = (("v1.0", "v1.1"), ("dev", "test"), ("en", "cn"))
    if len(parts) == 3 and all(p in a for p, a in zip(parts, allowed, strict=True)):
        return Edition(*parts)
    known = recognise(path)
    if given or known is None:
        raise InputError(
            f"The edition of {path.name!r} is not known; --edition is {given!r}.",
            advice="Give --edition, e.g. v1.1-dev-en: v1.0 or v1.1, dev or test, en or cn.",
        )
    return known


COMMAND = Command(
    summary="single choice with the options in every order (MMBench)",
    settings=BenchMmbench,
    run=run,
    example=(
        "mmlm bench mmbench --data MMBench_DEV_EN_V11.tsv --model llava-hf/llava-1.5-7b-hf\n"
        "mmlm bench mmbench --data MMBench_DEV_EN_V11.tsv --way vanilla"
    ),
)
