"""``mmlm bench mmir``: which elements of a page contradict the rest of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.bench.common import BenchOptions, Plan, run_plan
from mmlm.cli.frame import Command, Terminal
from mmlm.cli.judging import JudgeOptions, open_judge
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.base import Scores
    from benchmarks.judges import Judge

__all__ = ["COMMAND", "BenchMmir", "MmirJudge", "judge_of", "judged_lines"]


@dataclass(frozen=True)
class MmirJudge(JudgeOptions):
    """Who turns answers in words into ids of elements, and how it is asked.

    Attributes:
        kind: `match` takes the element that shares most words with the answer, without any model;
            never compare its numbers with a judge's. `openai`: a server that speaks OpenAI's chat
            completions; `hf`: a Hugging Face language model on this machine; `scripted`: replies
            from a file; `none` asks nobody.
    """

    kind: Literal["none", "match", "openai", "hf", "scripted"] = dataclasses.field(  # type: ignore[assignment]
        default="none", metadata={"alias": "--judge"}
    )


@dataclass(frozen=True)
class BenchMmir(BenchOptions):
    """Options of ``mmlm bench mmir``.

    Attributes:
        data: A local copy of the data set rippleripple/MMIR: its folder with `images`,
            `questions_mcq.json` and `questions_open.json`, which may be in `test`.
        setting: `mcq`: ids are chosen from the list of all elements; `open`: the elements are
            named in words, which a judge turns into ids.
        template: The judge's prompt, with {} for the elements and for the answer, in this order;
            by default a wording of our own.
        judge: Who turns words into ids; needed for `open`.
    """

    data: Path | None = field(default=None, metadata={"alias": "--data"})
    setting: Literal["mcq", "open"] = "mcq"
    template: Path | None = None
    judge: MmirJudge = field(default_factory=MmirJudge)


def run(settings: BenchMmir, terminal: Terminal) -> int:
    """Asks the questions, has answers in words judged, and scores them."""
    from benchmarks import mmir
    from benchmarks.stored import content_hash
    from mmlm.records import file_hash

    if settings.data is None:
        raise InputError(
            "--data is missing.",
            advice="Give the folder of a local copy of the data set rippleripple/MMIR.",
        )
    judge = judge_of(settings.judge, settings.setting, terminal)
    questions = mmir.read_questions(settings.data, settings.setting)
    pictures = mmir.find_pictures(questions, settings.data, settings.setting)
    answers = settings.folder("mmir") / "answers.jsonl"

    def score(lines: Sequence[Mapping[str, Any]]) -> Scores:
        return mmir.score_stored(judged_lines(lines, judge, settings.template, answers))

    plan = Plan(
        benchmark="mmir",
        scorer=f"mmir/{settings.setting}",
        data={
            "setting": settings.setting,
            "questions": content_hash([_plain(asdict(question)) for question in questions]),
            "pictures": content_hash({name: file_hash(path) for name, path in pictures.items()}),
        },
        task=lambda: mmir.task(questions, pictures, settings.setting),
        score=score,
        information={"folder": str(settings.data)},
    )
    return run_plan(settings, terminal, plan)


def judge_of(options: MmirJudge, setting: str, terminal: Terminal) -> Judge | str | None:
    """The judge of a setting: an object, "match", or None where nobody is needed.

    Raises:
        InputError: If answers in words have no judge, or ids have one.
    """
    if setting == "mcq":
        if options.kind != "none":
            raise InputError(
                f"--judge {options.kind} is given; multiple choice needs none.",
                advice="Leave --judge out, or take --setting open.",
            )
        return None
    if options.kind == "none":
        raise InputError(
            "Answers in words need a judge, which turns them into ids.",
            advice="Give --judge openai with --judge.model (the authors took o1-mini), or "
            "--judge match, which needs no model.",
        )
    if options.kind == "match":
        return options.kind
    return open_judge(options, terminal, temperature=1.0)  # the authors send none: the default


def judged_lines(
    lines: Sequence[Mapping[str, Any]],
    judge: Judge | str | None,
    template: Path | None,
    answers: Path,
) -> Sequence[Mapping[str, Any]]:
    """Has answers judged; verdicts are stored beside them."""
    from benchmarks import mmir
    from benchmarks.judges import judged

    if judge is None:
        return lines
    if isinstance(judge, str):
        found = mmir.match_answers(lines)
    else:
        prompt = mmir.JUDGE_TEMPLATE
        if template is not None:
            prompt = judged.read_template(template, mmir.JUDGE_PARTS)
        found = mmir.judge_answers(lines, judge, prompt)
    judged.write_judged(judged.judged_path(answers), found)
    return found


def _plain(record: dict[str, Any]) -> dict[str, Any]:
    """A question as JSON has it: keys are texts."""
    return record | {"elements": {str(name): text for name, text in record["elements"].items()}}


COMMAND = Command(
    summary="which elements of a page contradict the rest of it (MMIR)",
    settings=BenchMmir,
    run=run,
    example=(
        "mmlm bench mmir --data MMIR --model llava-hf/llava-1.5-7b-hf\n"
        "mmlm bench mmir --data MMIR --setting open --judge match\n"
        "mmlm bench mmir --data MMIR --setting open --judge openai --judge.model o1-mini "
        "--judge.temperature omit"
    ),
)
