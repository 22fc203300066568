"""``mmlm bench``: ask a model a benchmark's questions, store the answers, score them."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal
from mmlm.cli.options import (
    ModelOptions,
    check_model_name,
    method_field,
    open_model,
    parse_methods,
)
from mmlm.cli.pictures import DataOptions, Source, find
from mmlm.errors import InputError
from mmlm.runner import GenerateSettings

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.pope_questions import Question
    from benchmarks.run import Task
    from mmlm.records import RecordFile

__all__ = ["COMMANDS", "BenchChair", "BenchPope"]


@dataclass(frozen=True)
class BenchChair:
    """Options of ``mmlm bench chair``.

    Attributes:
        output: Folder for captions.jsonl, its run record and scores.json. If the captions of the
            same run are there, it goes on where it stopped.
        methods: A method, e.g. "VHR(alpha=2.0)"; `none` for the plain model.
        prompt: The question. Default: "Please describe this image in detail.", for the world
            "describe the image in detail .".
        variant: Word procedure of the scorer; part of the metric's name.
        data: Which pictures.
        model: The model.
        generate: How captions are generated.
    """

    output: Path = Path("bench/chair")
    methods: tuple[str, ...] = method_field()
    prompt: str | None = None
    variant: Literal["wordnet", "pattern"] = "wordnet"
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    generate: GenerateSettings = field(default_factory=GenerateSettings)


@dataclass(frozen=True)
class BenchPope:
    """Options of ``mmlm bench pope``.

    Attributes:
        output: Folder for answers.jsonl, its run record and scores.json. If the answers of the
            same run are there, it goes on where it stopped.
        methods: A method, e.g. "VHR(alpha=2.0)"; `none` for the plain model.
        questions: A question file in POPE's format, e.g. coco_pope_random.json; needs --images.
            Without one, the world's questions, or questions built from --annotations.
        suffix: What follows the question. `llava`: "Answer the question using a single word or
            phrase."; `vcd`: "Please answer this question with one word."
        parser: How answers are read as yes or no; part of the metric's name.
        data: Which pictures.
        model: The model.
        generate: How answers are generated.
    """

    output: Path = Path("bench/pope")
    methods: tuple[str, ...] = method_field()
    questions: tuple[Path, ...] = field(default=(), metadata={"alias": "--questions"})
    suffix: Literal["none", "llava", "vcd"] = "none"
    parser: Literal["strict", "official", "opera", "vcd", "lmms-eval", "vlmevalkit"] = "strict"
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    generate: GenerateSettings = field(default_factory=GenerateSettings)


def run_chair(settings: BenchChair, terminal: Terminal) -> int:
    """Captions pictures and scores CHAIR."""
    from benchmarks import chair, run, tables

    source = find(settings.data, settings.output / "pictures")
    prompt = settings.prompt or source.prompt

    def task(drawn: Source) -> Task:
        return run.caption_task(drawn.pictures, drawn.folder, prompt, settings.variant)

    data = {**source.description, "prompt": prompt}
    drawn, records = _answer(settings, terminal, source, "captions.jsonl", data, task)
    captions = chair.read_captions(records.path)
    result = chair.score(captions, drawn.truth(settings.variant), settings.variant)
    return _report(settings, terminal, records, result.as_json(), tables.chair_table(result))


def run_pope(settings: BenchPope, terminal: Terminal) -> int:
    """Asks yes/no questions and scores POPE."""
    from benchmarks import pope, run, tables

    asked: dict[str, Sequence[Question]] = {}
    if settings.questions:
        asked, source = _question_files(settings.questions), _bare(settings)
    else:
        source = find(settings.data, settings.output / "pictures")
    suffix = pope.PROMPT_SUFFIXES[settings.suffix]

    def task(drawn: Source) -> Task:
        return run.pope_task(
            asked or drawn.questions(),
            drawn.folder,
            suffix=suffix,
            version_name=source.version,
            parser=settings.parser,
        )

    data = {**source.description, "suffix": suffix}
    _, records = _answer(settings, terminal, source, "answers.jsonl", data, task)
    summary, _ = pope.score_stored(list(records.done.values()), settings.parser)
    return _report(settings, terminal, records, summary.as_json(), tables.pope_table(summary))


def _answer(
    settings: BenchChair | BenchPope,
    terminal: Terminal,
    source: Source,
    name: str,
    data: Mapping[str, Any],
    make_task: Callable[[Source], Task],
) -> tuple[Source, RecordFile]:
    """Checks the request, draws the pictures, loads the model, answers what is missing."""
    from benchmarks import run
    from mmlm.records import RecordFile
    from mmlm.runner import fingerprint

    methods = parse_methods(settings.methods)
    check_model_name(settings.model.id)
    if isinstance(settings, BenchChair):
        benchmark, scorer = "chair", settings.variant
    else:
        benchmark, scorer = "pope", settings.parser
    record = run.run_record(
        benchmark,
        data,
        asdict(settings.model),
        methods,
        settings.generate,
        scorer=f"{benchmark}/{scorer}",
        **source.truth_files(),
    )
    path = settings.output / name
    if settings.output.is_dir():
        RecordFile(path, record)  # refuses the output of another run before the model is loaded
    model, processor = open_model(settings.model, methods, terminal)
    settings.output.mkdir(parents=True, exist_ok=True)
    drawn = source.draw(terminal.progress)
    task = make_task(drawn)
    records = RecordFile(path, record | {"weights": fingerprint(model)})
    if len(records.done) < len(task.items):
        with records:
            steps = run.answer(
                task,
                records,
                model,
                processor,
                methods,
                settings.generate,
                progress=terminal.progress,
            )
            new = sum(steps)
        seconds = run.stored_speed(records).seconds
        terminal.note(f"{new} new answers; all {len(records.done)} took {seconds:.1f} s.")
    return drawn, records


def _report(
    settings: BenchChair | BenchPope,
    terminal: Terminal,
    records: RecordFile,
    scores: dict[str, Any],
    table: Table,
) -> int:
    """Shows and stores the scores."""
    from mmlm.records import write_json

    failed = [record for record in records.done.values() if record.get("error")]
    for record in failed[:5]:
        terminal.note(f"failed: {record['id']}: {record['error']}")
    if failed:
        terminal.note(f"{len(failed)} of {len(records.done)} failed and are left out.")
    scores |= {"failed": len(failed), "methods": [repr(m) for m in parse_methods(settings.methods)]}
    write_json(settings.output / "scores.json", scores)
    terminal.table(table)
    if terminal.json:
        terminal.emit(scores | {"output": str(settings.output)})
    return SOME_FAILED if failed else DONE


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


COMMANDS = {
    "chair": Command(
        summary="caption pictures and count invented objects",
        settings=BenchChair,
        run=run_chair,
        example=(
            'mmlm bench chair --method "VHR(alpha=2.0)" --output runs/vhr\n'
            "mmlm bench chair --model llava-hf/llava-1.5-7b-hf --images val2014 --subset opera500"
        ),
    ),
    "pope": Command(
        summary="ask whether objects are in pictures, present and absent ones",
        settings=BenchPope,
        run=run_pope,
        example=(
            "mmlm bench pope --output runs/pope\n"
            "mmlm bench pope --model llava-hf/llava-1.5-7b-hf --suffix llava --images val2014 \\\n"
            "    --questions coco_pope_random.json --questions coco_pope_popular.json"
        ),
    ),
}
