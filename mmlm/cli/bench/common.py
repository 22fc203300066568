"""The course that all benchmarks share: check, load, answer what is missing, score, show.

A command checks its own options and hands over a `Plan`; everything else happens here, once:
refusals before any work, resuming, shards, the run record, the scores beside the answers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, SOME_FAILED, Terminal
from mmlm.cli.options import (
    ModelOptions,
    check_model_name,
    method_field,
    open_model,
    parse_methods,
)
from mmlm.errors import InputError
from mmlm.runner import GenerateSettings

if TYPE_CHECKING:
    from rich.table import Table

    from benchmarks.base import Scored
    from benchmarks.run import Task
    from mmlm.engine.method import Method
    from mmlm.records import RecordFile
    from mmlm.sharding import Shard

__all__ = ["BenchOptions", "Plan", "run_plan"]


@dataclass(frozen=True)
class BenchOptions:
    """Options of every benchmark.

    Attributes:
        output: Folder for the answers, their run record and scores.json; by default
            bench/<name>. If answers of the same run are there, it goes on where it stopped.
        methods: A method, e.g. "VHR(alpha=2.0)"; `none` for the plain model.
        shard: Answer only part i of n, written `i/n` with i from 0 to n-1; the part that finishes
            last puts all together and scores. Under `accelerate launch` or `torchrun` the
            processes divide the run by themselves.
        model: The model.
        generate: How answers are generated.
    """

    output: Path | None = None
    methods: tuple[str, ...] = method_field()
    shard: str = ""
    model: ModelOptions = field(default_factory=ModelOptions)
    generate: GenerateSettings = field(default_factory=GenerateSettings)

    def folder(self, benchmark: str) -> Path:
        """Where the run stands."""
        return self.output or Path("bench") / benchmark


@dataclass(frozen=True)
class Plan:
    """What a benchmark's command hands to the common course.

    Attributes:
        benchmark: Name of the command and, by default, of the output folder.
        scorer: Name of the scorer with its variant, for the run record.
        data: What determines the requests and their truth: hashes, prompts, ids.
        task: Makes the requests; called after all checks, when the model is known to load.
        task_sees_model: Whether `task` is given the model and its processor.
        score: Scores stored answers, in the order of the data set.
        file: Name of the file of answers.
        information: Paths and other facts that do not determine the answers.
        table: Shows the scores; by default `benchmarks.tables.scores_table`.
        methods: Attached besides the user's, e.g. a probe.
    """

    benchmark: str
    scorer: str
    data: Mapping[str, Any]
    task: Callable[..., Task]
    score: Callable[[Sequence[Mapping[str, Any]]], Scored]
    file: str = "answers.jsonl"
    information: Mapping[str, Any] = field(default_factory=dict)
    table: Callable[[Any], Table] | None = None
    methods: tuple[Method, ...] = ()
    task_sees_model: bool = False


def run_plan(settings: BenchOptions, terminal: Terminal, plan: Plan) -> int:
    """Answers what has no answer yet, scores everything, shows and stores the scores.

    Returns:
        ``DONE``, or ``SOME_FAILED`` if some requests have no answer.

    Raises:
        MmlmError: For everything that makes the run impossible, before any work.
    """
    from benchmarks import run
    from benchmarks.reports.stored_runs import provisions
    from mmlm.records import INFORMATION, RecordFile, locked
    from mmlm.runner import fingerprint
    from mmlm.sharding import this_shard

    shard = this_shard(settings.shard)
    methods = parse_methods(settings.methods) + plan.methods
    check_model_name(settings.model.id)
    folder = settings.folder(plan.benchmark)
    path = folder / plan.file
    record = run.run_record(
        plan.benchmark,
        plan.data,
        asdict(settings.model),
        methods,
        settings.generate,
        scorer=plan.scorer,
        **plan.information,
    )
    if folder.is_dir():
        RecordFile(path, record)  # refuses the output of another run before the model is loaded
    model, processor = open_model(settings.model, methods, terminal)
    with locked(path):  # other shards prepare the same pictures
        task = plan.task(model, processor) if plan.task_sees_model else plan.task()
    record |= {"weights": fingerprint(model), "revision": _revision(model)}
    record[INFORMATION] |= provisions(task)
    order = [item.request.id for item in task.items]
    records = RecordFile(path, record)
    if len(records.done) < len(order):
        mine = records
        if shard.count > 1:
            mine = RecordFile(shard.path(path), {**record, "shard": str(shard)})
        _answer(settings, terminal, task, mine, shard, model, processor, methods)
        if shard.count > 1:
            merged = _merge(terminal, path, shard, record, order)
            if merged is None:
                return DONE
            records = merged
    return _report(terminal, folder, records, methods, plan)


def _answer(
    settings: BenchOptions,
    terminal: Terminal,
    task: Task,
    records: RecordFile,
    shard: Shard,
    model: Any,
    processor: Any,
    methods: Sequence[Method],
) -> None:
    """Answers this shard's part."""
    from dataclasses import replace

    from benchmarks import run

    items = tuple(item for item in task.items if shard.owns(item.request.id))
    if not items:
        raise InputError(
            f"Shard {shard} has nothing to do: there are only {len(task.items)} requests.",
            advice="Use fewer shards.",
        )
    if records.done:
        terminal.note(f"{len(records.done)} of {len(items)} were done; going on.")
    with records:
        steps = run.answer(
            replace(task, items=items),
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


def _merge(
    terminal: Terminal, path: Path, shard: Shard, record: Mapping[str, Any], order: Sequence[str]
) -> RecordFile | None:
    """The whole file if this was the last part; otherwise None, and a remark on what is missing."""
    from benchmarks import run
    from mmlm.sharding import Shard, merge

    records, unfinished = merge(path, shard.count, record, order)
    if unfinished:
        named = ", ".join(f"{index}/{shard.count}" for index in unfinished)
        terminal.note(f"Shard {shard} is done; not finished yet: {named}.")
        return None
    parts = [Shard(index, shard.count).path(path) for index in range(shard.count)]
    run.store_speed(path, [run.speed_of(part) for part in parts])
    return records


def _report(
    terminal: Terminal, folder: Path, records: RecordFile, methods: Sequence[Method], plan: Plan
) -> int:
    """Scores, shows and stores the scores."""
    from benchmarks import tables
    from mmlm.records import write_json

    lines = list(records.done.values())
    failed = [line for line in lines if line.get("error")]
    for line in failed[:5]:
        terminal.note(f"failed: {line['id']}: {line['error']}")
    if failed:
        terminal.note(f"{len(failed)} of {len(lines)} failed and are left out.")
    result = plan.score(lines)
    record = result.as_json() | {"failed": len(failed), "methods": [repr(m) for m in methods]}
    write_json(folder / "scores.json", record)
    terminal.table((plan.table or tables.scores_table)(result))
    if terminal.json:
        terminal.emit(record | {"output": str(folder)})
    return SOME_FAILED if failed else DONE


def _revision(model: Any) -> str | None:
    """The commit of the checkpoint on the hub, if it came from there."""
    return getattr(model.config, "_commit_hash", None)
