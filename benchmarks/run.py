"""Asking a model a benchmark's questions. The answers are stored; scoring needs nothing else.

A `Task` is the list of requests of a benchmark with the facts that scoring will need (image id,
label, split). `answer` sends them through `mmlm.runner` and appends one JSON line per answer, in
the order of the data set whatever the batch size; a run that was stopped goes on where it was.
"""

from __future__ import annotations

import json
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.records import INFORMATION, write_json
from mmlm.runner import GenerateSettings, Request, generate_batches

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from mmlm.engine.method import Method
    from mmlm.records import RecordFile
    from mmlm.runner import Result

__all__ = [
    "Item",
    "Speed",
    "Task",
    "answer",
    "run_record",
    "speed_of",
    "store_speed",
    "stored_speed",
]


@dataclass(frozen=True)
class Item:
    """One request and what scoring must know about it.

    Attributes:
        request: What the model is asked.
        facts: Fields copied to the stored line.
    """

    request: Request
    facts: Mapping[str, Any]


@dataclass(frozen=True)
class Task:
    """The requests of a benchmark.

    Attributes:
        metric: Name under which results may be published, scorer variant included.
        items: The requests, in the order of the data set.
        answer_field: Field of the stored line that holds the answer.
        methods_of: What is attached beside the run's methods for requests that are answered
            together, in the order of their rows.
    """

    metric: str
    items: tuple[Item, ...]
    answer_field: str = "text"
    methods_of: Callable[[Sequence[Request]], Sequence[Method]] | None = None


@dataclass(frozen=True)
class Speed:
    """How long answers took.

    Attributes:
        seconds: Wall-clock time of generating, loading of pictures included.
        answers: Number of answers.
        tokens: Number of new tokens.
    """

    seconds: float = 0.0
    answers: int = 0
    tokens: int = 0

    def __add__(self, other: Speed) -> Speed:
        """The speed of two parts of a run together."""
        return Speed(
            self.seconds + other.seconds, self.answers + other.answers, self.tokens + other.tokens
        )

    @property
    def seconds_per_answer(self) -> float | None:
        """Mean time of an answer; None if nothing was timed."""
        return self.seconds / self.answers if self.answers else None


def run_record(
    benchmark: str,
    data: Mapping[str, Any],
    model: Mapping[str, Any],
    methods: Sequence[Method],
    settings: GenerateSettings,
    **information: Any,
) -> dict[str, Any]:
    """Everything that determines the answers; ``information`` is what does not.

    Args:
        benchmark: Name of the benchmark.
        data: What determines the requests.
        model: Id and loading options of the model.
        methods: The methods in use.
        settings: How answers are generated.
        **information: Further facts worth storing.
    """
    fixed = ("id", "dtype", "attention", "chat_template")
    return {
        "command": f"bench {benchmark}",
        "model": {name: model[name] for name in fixed if name in model},
        "methods": [repr(method) for method in methods],
        "generate": asdict(settings),
        "data": dict(data),
        INFORMATION: {
            "device": model.get("device"),
            "versions": {name: version(name) for name in ("mmlm", "torch", "transformers", "nltk")},
            **information,
        },
    }


def answer(
    task: Task,
    records: RecordFile,
    model: Any,
    processor: Any,
    methods: Sequence[Method],
    settings: GenerateSettings,
    *,
    progress: bool = False,
) -> Iterator[int]:
    """Answers what has no answer yet, and stores it batch by batch.

    How long all sessions of the run took together stands beside the output (`stored_speed`).
    Because nothing happens between two steps, several runs can take turns: then all of them meet
    the same load of the machine, and their times can be compared.

    Args:
        task: The benchmark.
        records: The output, opened.
        model: A Hugging Face LVLM.
        processor: Its processor.
        methods: Methods attached while the model generates.
        settings: How to generate.
        progress: Show a progress bar.

    Yields:
        The number of new answers in each batch.
    """
    items = {item.request.id: item for item in task.items}
    records.in_order(list(items))
    batches = generate_batches(
        model,
        processor,
        [item.request for item in task.items],
        methods,
        settings,
        done={str(identifier) for identifier in records.done},
        progress=progress,
        methods_of=task.methods_of,
    )
    speed = stored_speed(records) if records.done else Speed()
    for results, seconds in _timed(batches):
        records.append([_line(task, items[result.id], result) for result in results])
        speed += Speed(seconds, len(results), sum(result.n_tokens for result in results))
        store_speed(records.path, [speed])
        yield len(results)


def stored_speed(records: RecordFile) -> Speed:
    """How long the answers in an output took; all zero if it was not measured."""
    return speed_of(records.path)


def speed_of(output: Path) -> Speed:
    """How long the answers in a file took; all zero if it was not measured."""
    path = _speed_path(output)
    return Speed(**json.loads(path.read_text(encoding="utf-8"))) if path.exists() else Speed()


def store_speed(output: Path, parts: Sequence[Speed]) -> None:
    """Stores how long the parts of a run took together, beside its output."""
    write_json(_speed_path(output), asdict(sum(parts, Speed())))


def _line(task: Task, item: Item, result: Result) -> dict[str, Any]:
    line = {"id": result.id, **item.facts, "prompt": result.prompt}
    if result.error is not None:
        return line | {task.answer_field: None, "n_tokens": 0, "error": result.error}
    line |= {
        task.answer_field: result.text,
        "n_tokens": result.n_tokens,
        "templated": result.templated,
    }
    line |= result.measures
    if result.turns:
        line["turns"] = [asdict(turn) for turn in result.turns]
    return line


def _timed(batches: Iterator[list[Result]]) -> Iterator[tuple[list[Result], float]]:
    """Times what the generator does, not what its consumer does with the results."""
    start = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - start
        start = time.perf_counter()


def _speed_path(output: Path) -> Path:
    return output.with_name(output.name + ".speed.json")
