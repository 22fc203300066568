"""``mmlm bench mmhal``: MMHal-Bench, 96 free answers rated by a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.judging import JudgeOptions, open_judge
from mmlm.cli.official import given_or_official

if TYPE_CHECKING:
    from benchmarks.base import Scores

__all__ = ["COMMAND", "BenchMmhal"]


@dataclass(frozen=True)
class BenchMmhal(BenchOptions):
    """Options of ``mmlm bench mmhal``.

    Attributes:
        images: Folder of the 96 pictures, under their published file names or as
            <Open Images id>.jpg; by default where `mmlm data fetch mmhal-images` puts them.
        data: Questions in the official format; by default the published ones.
        template: The judge's prompt, with {} for objects, question, reference answer and answer,
            in this order; by default a wording of our own.
        judge: Who rates the answers. Without a judge the answers are stored, and
            `mmlm score mmhal` can have them judged later.
    """

    images: Path | None = field(default=None, metadata={"alias": "--images"})
    data: Path | None = field(default=None, metadata={"alias": "--data"})
    template: Path | None = None
    judge: JudgeOptions = field(default_factory=JudgeOptions)


def run(settings: BenchMmhal, terminal: Terminal) -> int:
    """Asks the questions, has the answers judged, and scores them."""
    from dataclasses import asdict

    from benchmarks import mmhal
    from benchmarks.judges import judged
    from benchmarks.stored import content_hash
    from mmlm.records import file_hash

    folder = given_or_official("images", settings.images, "mmhal-images")
    questions = mmhal.read_questions(settings.data)
    pictures = mmhal.find_pictures(questions, folder)
    template = mmhal.JUDGE_TEMPLATE
    if settings.template is not None:
        template = judged.read_template(settings.template, mmhal.JUDGE_PARTS)
    judge = open_judge(settings.judge, terminal, temperature=0.0)
    answers = settings.folder("mmhal") / "answers.jsonl"

    def score(lines: Sequence[Mapping[str, Any]]) -> Scores:
        if judge is None:
            terminal.note(
                f"The answers are not judged. `mmlm score mmhal {answers} --judge openai "
                "--judge.model NAME` does it."
            )
            return mmhal.score_stored(lines, allow_unjudged=True)
        lines = mmhal.judge_answers(lines, judge, template)
        judged.write_judged(judged.judged_path(answers), lines)
        return mmhal.score_stored(lines)

    plan = Plan(
        benchmark="mmhal",
        scorer="mmhal",
        data={
            "questions": content_hash([asdict(question) for question in questions]),
            "pictures": content_hash({path.name: file_hash(path) for path in pictures}),
        },
        task=lambda: mmhal.task(questions, folder),
        score=score,
        information={"folder": str(folder), "judge": judge and judge.name},
    )
    return run_plan(settings, terminal, plan)


COMMAND = Command(
    summary="free answers to 96 questions, rated from 0 to 6 by a judge",
    settings=BenchMmhal,
    run=run,
    example=(
        "mmlm bench mmhal --model llava-hf/llava-1.5-7b-hf --images mmhal_images\n"
        "mmlm bench mmhal --images mmhal_images --judge openai --judge.model gpt-4-0314"
    ),
)
