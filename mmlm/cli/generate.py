"""``mmlm generate``: a file of questions about pictures in, a file of answers out."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal
from mmlm.cli.options import ModelOptions, check_model_name, method_field, open_model, parse_methods
from mmlm.errors import InputError
from mmlm.records import INFORMATION, RecordFile, file_hash, read_lines
from mmlm.runner import GenerateSettings, Request, Result, fingerprint, generate_batches
from mmlm.sharding import this_shard

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["COMMAND", "Generate", "as_request", "read_requests", "run"]

# The fields of an output line that are ours; a question may not bring them along.
ANSWER_FIELDS = ("text", "n_tokens", "templated", "error")
SHOWN = 5


@dataclass(frozen=True)
class Generate:
    """Options of ``mmlm generate``.

    Attributes:
        input: JSON lines with `id`, `image` or `images`, `prompt`. Paths of pictures are relative
            to this file. With `"marked": true` the prompt says where its pictures stand:
            <image 1>, <image 2> and so on. Other fields are copied to the output.
        output: JSON lines, one per question in the same order, with `text`, `n_tokens` and
            `templated` or `error`. If the file is there, the run goes on where it stopped.
        methods: A method, e.g. "VHR(alpha=2.0)"; `none` for the plain model.
        shard: `i/n`, i from 0 to n-1: only the questions whose crc32(id) mod n is i. Under
            `accelerate launch` or `torchrun` every process takes its part by itself and writes
            OUTPUT.shard-i-of-n.
        strict: Stop at the first question that fails.
        model: The model.
        generate: How answers are generated.
    """

    input: Path
    output: Path
    methods: tuple[str, ...] = method_field()
    shard: str = ""
    strict: bool = False
    model: ModelOptions = field(default_factory=ModelOptions)
    generate: GenerateSettings = field(default_factory=GenerateSettings)


def run(settings: Generate, terminal: Terminal) -> int:
    """Answers every question that has no answer yet.

    Returns:
        ``DONE``, or ``SOME_FAILED`` if the output holds a line with an error.

    Raises:
        MmlmError: For everything that makes the run impossible, before any work.
    """
    shard = this_shard(settings.shard)
    questions = [q for q in read_requests(settings.input) if shard.owns(str(q["id"]))]
    check_model_name(settings.model.id)
    methods = parse_methods(settings.methods)
    output = settings.output if settings.shard else shard.path(settings.output)
    records = RecordFile(output, _run_record(settings, methods))
    n_before = len(records.done)
    if n_before < len(questions):
        model, processor = open_model(settings.model, methods, terminal)
        records.add_facts({"weights": fingerprint(model)})
        if n_before:
            terminal.note(f"{n_before} of {len(questions)} were done; going on.")
        records.in_order([question["id"] for question in questions])
        with records:
            batches = generate_batches(
                model,
                processor,
                [as_request(question, settings.input.parent) for question in questions],
                methods,
                settings.generate,
                done={str(identifier) for identifier in records.done},
                progress=terminal.progress,
            )
            by_id = {str(question["id"]): question for question in questions}
            for results in batches:
                records.append([_answer(by_id[result.id], result) for result in results])
                if settings.strict and any(result.error for result in results):
                    break
    return _report(settings, terminal, records, len(questions), n_before)


def read_requests(path: Path) -> list[dict[str, Any]]:
    """Reads and checks the questions.

    Args:
        path: A JSON lines file.

    Returns:
        The lines as they are.

    Raises:
        InputError: If the file is missing or empty, a line lacks a field or has one of the wrong
            type, or an ``id`` is there twice.
    """
    questions = read_lines(path)
    if not questions:
        raise InputError(
            f"{str(path)!r} holds no question.",
            advice='Write one JSON object per line: {"id": "1", "image": "a.jpg", "prompt": "..."}',
        )
    for number, question in enumerate(questions, start=1):
        if problem := _problem(question):
            raise InputError(
                f"{path}, question {number} (id {question.get('id')!r}): {problem}.",
                advice="Every line needs `id`, `prompt`, and `image` (one path) or `images` "
                "(a list).",
            )
    # As text: 1 and "1" would be the same question for everybody who reads the answers.
    counts = Counter(str(question["id"]) for question in questions)
    if twice := [identifier for identifier, count in counts.items() if count > 1]:
        raise InputError(
            f"{path}: the id {twice[0]!r} is there {counts[twice[0]]} times"
            + (f", and {len(twice) - 1} other ids more than once." if len(twice) > 1 else "."),
            advice="Give every question its own id.",
        )
    return questions


def _problem(question: dict[str, Any]) -> str | None:
    if not isinstance(question.get("id"), str | int) or isinstance(question["id"], bool):
        return "`id` must be text or a whole number"
    if not isinstance(question.get("prompt"), str) or not question["prompt"].strip():
        return "`prompt` must be text"
    if ("image" in question) == ("images" in question):
        return "there must be either `image` or `images`"
    if "image" in question and not isinstance(question["image"], str):
        return "`image` must be one path"
    images = question.get("images", [])
    if not (isinstance(images, list) and all(isinstance(image, str) for image in images)):
        return "`images` must be a list of paths"
    if not isinstance(question.get("marked", False), bool):
        return "`marked` must be true or false"
    if ours := [name for name in ANSWER_FIELDS if name in question]:
        return f"`{ours[0]}` is a field of the answers"
    return None


def as_request(question: dict[str, Any], folder: Path) -> Request:
    """A checked question as a request; paths of pictures are relative to ``folder``."""
    images = question["images"] if "images" in question else [question["image"]]
    # An address keeps its "://" for the error message; a path would swallow one slash.
    return Request(
        id=str(question["id"]),
        images=tuple(image if "://" in image else folder / image for image in images),
        prompt=question["prompt"],
        marked=question.get("marked", False),
    )


def _answer(question: dict[str, Any], result: Result) -> dict[str, Any]:
    if result.error is not None:
        return question | {"text": None, "n_tokens": 0, "error": result.error}
    return question | {
        "text": result.text,
        "n_tokens": result.n_tokens,
        "templated": result.templated,
    }


def _run_record(settings: Generate, methods: Sequence[Method]) -> dict[str, Any]:
    """Everything that determines the answers; ``information`` is what does not."""
    from importlib.metadata import version

    model = dataclasses.asdict(settings.model)
    generate = dataclasses.asdict(settings.generate)
    # Sampled answers depend on the batches, greedy ones do not: whoever ran out of memory may go
    # on with smaller batches.
    batch = {} if settings.generate.do_sample else {"batch_size": generate.pop("batch_size")}
    return {
        "command": "generate",
        "model": {name: model[name] for name in ("id", "dtype", "attention", "chat_template")},
        "methods": [method.text for method in methods],
        "generate": generate,
        "input_hash": file_hash(settings.input),
        "shard": str(this_shard(settings.shard)),
        INFORMATION: {
            "input": str(settings.input),
            "device": settings.model.device,
            **batch,
            "versions": {name: version(name) for name in ("mmlm", "torch", "transformers")},
        },
    }


def _report(
    settings: Generate, terminal: Terminal, records: RecordFile, n_questions: int, n_before: int
) -> int:
    failed = [record for record in records.done.values() if record.get("error") is not None]
    if terminal.json:
        terminal.emit(
            {
                "output": str(settings.output),
                "questions": n_questions,
                "answered": len(records.done) - len(failed),
                "failed": len(failed),
                "done_before": n_before,
            }
        )
    for record in failed[:SHOWN]:
        terminal.note(f"failed: {record['id']}: {record['error']}")
    if settings.strict and failed and len(records.done) < n_questions:
        terminal.error(
            f"Stopped at question {failed[-1]['id']!r}: {failed[-1]['error']}",
            "Go on without --strict: the other questions are answered then.",
        )
        return SOME_FAILED
    more = f" (the first {SHOWN} are shown)" if len(failed) > SHOWN else ""
    terminal.note(
        f"{len(records.done)} of {n_questions} lines in {settings.output}; "
        f"{len(failed)} failed{more}."
    )
    return SOME_FAILED if failed else DONE


COMMAND = Command(
    summary="answer a file of questions about pictures: JSON lines in, JSON lines out",
    settings=Generate,
    run=run,
    example=(
        "mmlm generate --input questions.jsonl --output answers.jsonl\n"
        "mmlm generate --config decode/vhr --model llava-hf/llava-1.5-7b-hf \\\n"
        "    --input questions.jsonl --output answers.jsonl --generate.batch_size 4"
    ),
)
