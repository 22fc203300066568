"""``mmlm demo``: the main job in one command. Draw, caption, mitigate, score, show.

Pictures of the embedded world (or a folder in COCO format) are captioned plainly and with each
method, yes/no questions about objects are asked, everything is scored, and a table and a page with
pictures say what changed. Nothing is assumed to help: the numbers come from this very run.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.configs import effect_label, effect_settings
from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal
from mmlm.cli.options import (
    EMBEDDED,
    ModelOptions,
    check_model_name,
    open_model,
    parse_methods,
)
from mmlm.cli.pictures import DataOptions, Source, find
from mmlm.errors import InputError, UnsupportedModel
from mmlm.progress import progress_bar
from mmlm.runner import GenerateSettings

if TYPE_CHECKING:
    from benchmarks.reports.report import MethodRun
    from benchmarks.run import Task
    from mmlm.engine.method import Method
    from mmlm.records import RecordFile

__all__ = ["COMMAND", "Demo", "DemoGenerate"]

REPORT = "report.html"
RESULTS = "results.json"
PLAIN = "plain"
ALL = "all"
ANSWER_TOKENS = 16
"""Enough for any yes/no answer; a model that does not stop by itself must not cost minutes."""
FULL = (300, 60)  # pictures to caption, pictures to ask about
QUICK = (60, 12)


@dataclass(frozen=True)
class DemoGenerate(GenerateSettings):
    """Replaced below by the text of its parent, which explains every field."""

    max_new_tokens: int = 84
    batch_size: int = 30


DemoGenerate.__doc__ = GenerateSettings.__doc__


@dataclass(frozen=True)
class Demo:
    """Options of ``mmlm demo``.

    Attributes:
        output: Folder for report.html, results.json, the pictures and the answers. Answers that
            the same run left there are used again.
        methods: A method to compare with plain decoding, e.g. "VHR(alpha=2.0)"; "all": every
            method, on the embedded model at its recommended setting.
        quick: Fewer pictures: under a minute instead of under five.
        questions: Number of pictures that yes/no questions are asked about, six of each of the
            three kinds. Default: 60, quick: 12.
        data: Which pictures. The default count is 300, quick: 60.
        model: The model.
        generate: How captions are generated; yes/no answers get at most 16 new tokens.
    """

    output: Path = Path("demo")
    methods: tuple[str, ...] = field(default=("VHR", "VCD"), metadata={"alias": "--method"})
    quick: bool = False
    questions: int | None = None
    data: DataOptions = field(default_factory=DataOptions)
    model: ModelOptions = field(default_factory=ModelOptions)
    generate: DemoGenerate = field(default_factory=DemoGenerate)

    @property
    def n_questions(self) -> int:
        """Number of pictures that are asked about."""
        return self.questions or (QUICK if self.quick else FULL)[1]


def run(settings: Demo, terminal: Terminal) -> int:
    """Runs the whole demo.

    Returns:
        ``DONE``, or ``SOME_FAILED`` if a picture could not be read.

    Raises:
        MmlmError: For everything that makes the run impossible, before any work.
    """
    ways, optional = _ways(settings.methods, settings.model.id)
    source = _source(settings)
    check_model_name(settings.model.id)
    import mmlm
    from benchmarks.reports import page
    from mmlm import pages

    pages.claim(settings.output / REPORT, page.GENERATOR)

    model, processor = open_model(settings.model, (), terminal)
    for label, method in list(ways.items()):
        try:
            with mmlm.attach(model, *method, processor=processor):
                pass
        except UnsupportedModel as error:
            if label not in optional:
                raise
            terminal.note(str(error))
            del ways[label]
    settings.output.mkdir(parents=True, exist_ok=True)
    drawn = source.draw(terminal.progress)
    answers = _Answers(settings, drawn, model, processor)
    runs, failed = _run_all(answers, ways, terminal)
    _show(settings, drawn, runs, answers.folder, terminal)
    return SOME_FAILED if failed else DONE


def _ways(texts: Sequence[str], model: str) -> tuple[dict[str, tuple[Method, ...]], frozenset[str]]:
    """Ways of decoding by label: plain, then each method as the user wrote it.

    Also the labels that nobody named, only "all": they are left out where a model cannot have them.
    """
    ways: dict[str, tuple[Method, ...]] = {PLAIN: ()}
    every: list[str] = []
    for text in texts:
        if text.strip().lower() == ALL:
            every = [effect_label(name) for name in _every(model)]
            ways |= {effect_label(name): parse_methods([name]) for name in _every(model)}
        elif method := parse_methods([text]):
            ways[text.strip()] = method
    return ways, frozenset(every) - {text.strip() for text in texts}


def _every(model: str) -> list[str]:
    """Every decoding method: as recommended for the embedded model, else by its defaults."""
    if model == EMBEDDED:
        return [recommended for recommended, *_ in effect_settings(EMBEDDED).values()]
    import mmlm

    return mmlm.method_names("decoding")


def _source(settings: Demo) -> Source:
    if settings.questions is not None and settings.questions < 1:
        raise InputError(
            f"--questions is {settings.questions}.", advice="Ask about at least 1 picture."
        )
    data = settings.data
    if data.count is None:
        # A folder may hold fewer pictures than that.
        wanted = (QUICK if settings.quick else FULL)[0]
        known = find(data, settings.output / "pictures").count if data.images else wanted
        data = replace(data, count=min(wanted, known))
    return find(data, settings.output / "pictures")


@dataclass(frozen=True)
class _Answers:
    """The stored answers of this run: one file per way of decoding and benchmark."""

    settings: Demo
    source: Source
    model: Any
    processor: Any

    @property
    def folder(self) -> Path:
        """A folder of its own for every model, data set and setting, so that runs never mix."""
        facts = json.dumps(self._record((), {}), sort_keys=True).encode()
        name = re.sub(r"\W+", "-", Path(self.settings.model.id).name).strip("-")
        return self.settings.output / "answers" / f"{name}-{hashlib.sha256(facts).hexdigest()[:8]}"

    def _record(self, methods: Sequence[Method], data: Mapping[str, Any]) -> dict[str, Any]:
        from benchmarks import run as bench
        from mmlm.records import INFORMATION
        from mmlm.runner import fingerprint

        record = bench.run_record(
            "demo",
            {**self.source.description, "prompt": self.source.prompt, **data},
            asdict(self.settings.model),
            methods,
            self.settings.generate,
        )
        if not methods and not data:
            del record[INFORMATION]
        return record | {"weights": fingerprint(self.model)}

    def warm_up(self, ways: Mapping[str, tuple[Method, ...]]) -> None:
        """One picture before the clock runs: first calls load kernels and allocate memory."""
        from mmlm.runner import Request, generate_all

        first = self.source.folder / self.source.pictures[0].file_name
        request = Request("warm-up", (first,), self.source.prompt)
        settings = replace(self.settings.generate, max_new_tokens=4)
        for methods in ways.values():
            for _ in generate_all(self.model, self.processor, [request], methods, settings):
                pass

    def collect(
        self,
        kind: str,
        task: Task,
        ways: Mapping[str, tuple[Method, ...]],
        data: Mapping[str, Any],
        settings: GenerateSettings,
        advance: Callable[[int], None],
    ) -> dict[str, RecordFile]:
        """The answers of every way of decoding to one benchmark; computes what is not there.

        The ways take turns, a batch each: a machine that gets busy half-way slows down all of
        them, so that their times stay comparable.
        """
        from benchmarks import run as bench
        from mmlm.records import RecordFile

        self.folder.mkdir(parents=True, exist_ok=True)
        outputs: dict[str, RecordFile] = {}
        turns: deque[Iterator[int]] = deque()
        with ExitStack() as stack:
            for label, methods in ways.items():
                name = re.sub(r"[^\w.=]+", "-", label).strip("-")
                path = self.folder / f"{name}.{kind}.jsonl"
                record = self._record(methods, {**data, "metric": task.metric})
                outputs[label] = stack.enter_context(RecordFile(path, record))
                advance(len(outputs[label].done))
                turns.append(
                    bench.answer(
                        task, outputs[label], self.model, self.processor, methods, settings
                    )
                )
            while turns:
                steps = turns.popleft()
                if new := next(steps, 0):
                    advance(new)
                    turns.append(steps)
        return outputs


def _run_all(
    answers: _Answers, ways: Mapping[str, tuple[Method, ...]], terminal: Terminal
) -> tuple[list[MethodRun], int]:
    """Answers and scores everything; also the number of failed answers."""
    from benchmarks import chair, pope, run
    from benchmarks.reports.report import MethodRun

    source, settings = answers.source, answers.settings
    captions = chair.task(source.pictures, source.folder, source.prompt)
    splits = source.questions(settings.n_questions)
    questions = pope.task(splits, source.folder, version=source.version)
    asked = {"questions": settings.n_questions, "answer_tokens": ANSWER_TOKENS}
    generate = settings.generate
    short = replace(generate, max_new_tokens=min(ANSWER_TOKENS, generate.max_new_tokens))
    answers.warm_up(ways)
    total = len(ways) * (len(captions.items) + len(questions.items))
    with progress_bar(total, terminal.progress, "captions") as bar:
        captioned = answers.collect("chair", captions, ways, {}, generate, bar)
        bar.title("yes/no questions")
        kind = f"pope-{settings.n_questions}"
        answered = answers.collect(kind, questions, ways, asked, short, bar)
    truth = source.truth()
    runs, failed = [], 0
    for label, methods in ways.items():
        good = [line for line in captioned[label].done.values() if not line.get("error")]
        summary = pope.score_stored(list(answered[label].done.values()))
        failed += summary.statuses.get("failed", 0) + len(captions.items) - len(good)
        runs.append(
            MethodRun(
                label=label,
                text=repr(methods[0]) if methods else "",
                chair=chair.score(good, truth),
                pope=summary,
                speed=run.stored_speed(captioned[label]),
            )
        )
    if failed:
        terminal.note(f"{failed} answers failed, e.g. because a picture cannot be read.")
    return runs, failed


def _show(
    settings: Demo,
    source: Source,
    runs: Sequence[MethodRun],
    answers: Path,
    terminal: Terminal,
) -> None:
    """Prints the table, writes the page and the numbers."""
    from benchmarks.reports import page, report
    from mmlm.inputs import load_image
    from mmlm.records import write_json

    rows = report.compare(runs, source.themes)
    files = {picture.image_id: source.folder / picture.file_name for picture in source.pictures}
    facts = _facts(settings, source, runs)
    content = page.Page(
        runs=runs,
        rows=rows,
        source=f"model {settings.model.id} · {source.name}, {source.count} pictures",
        picture=lambda image: load_image(files[image]),
        facts=facts,
    )
    (settings.output / REPORT).write_text(page.render(content), encoding="utf-8")
    results = {"facts": facts, **report.as_json(runs, rows), "answers": str(answers)}
    write_json(settings.output / RESULTS, results)
    title = f"{settings.model.id} on {source.name}: {source.count} pictures"
    terminal.table(report.terminal(runs, rows, title))
    for sentence in results["conclusions"]:
        terminal.say(sentence)
    terminal.say(f"Pictures and details: {settings.output / REPORT}")
    if terminal.json:
        terminal.emit(results)


def _facts(settings: Demo, source: Source, runs: Sequence[MethodRun]) -> dict[str, str]:
    from importlib.metadata import version

    generate = settings.generate
    decoding = "greedy" if not generate.do_sample and generate.num_beams == 1 else repr(generate)
    facts = {
        "model": f"{settings.model.id} ({settings.model.dtype})",
        "pictures": json.dumps(source.description if source.polls else {"folder": source.name}),
        "question": source.prompt,
        "decoding": f"{decoding}, at most {generate.max_new_tokens} new tokens, "
        f"batches of {generate.batch_size}",
    }
    facts |= {f"method {run.label}": run.text for run in runs if run.text}
    versions = ("mmlm", "torch", "transformers", "nltk")
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in versions)
    return facts


COMMAND = Command(
    summary="caption, mitigate, score: the main job on the embedded world, with a report",
    settings=Demo,
    run=run,
    example=(
        "mmlm demo --quick\n"
        "mmlm demo --methods all\n"
        'mmlm demo --method "VHR(alpha=2.0)" --method "VHR(alpha=3.0)"\n'
        "mmlm demo --model llava-hf/llava-1.5-7b-hf --images photos --annotations instances.json"
    ),
)
