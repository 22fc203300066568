"""``mmlm calibrate heads``: which heads ACT or ZeroTuning should act on, or maps of heads.

Every head is tried alone on labelled questions, as in ACT's search and ZeroTuning's profile. Each
trial is one stored line, so a run that was stopped goes on where it was. Maps of visual heads and
of retrieval heads (``--kind``) are :mod:`mmlm.cli.calibrate.head_maps`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.calibrate import common, head_maps
from mmlm.cli.calibrate.head_trials import TOKENS, Accuracy, Judge, Trials
from mmlm.cli.calibrate.questions import (
    Labelled,
    QuestionOptions,
    labelled_questions,
)
from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import ModelOptions, open_model
from mmlm.errors import InputError
from mmlm.progress import tracked
from mmlm.records import INFORMATION, RecordFile, file_hash

if TYPE_CHECKING:
    from mmlm.engine.method import Method

__all__ = ["COMMAND", "Calibrate", "run"]

#: By kind of map, what heads may be ranked by; the first is the default.
_RANKS = {
    "visual": ("hit_rate", "hit_excess", "mass", "focus", "looks", "authors", "query_norm"),
    "text": ("set_score", "score"),
}


@dataclass(frozen=True)
class Calibrate:
    """Options of ``mmlm calibrate heads``.

    Attributes:
        method: ACT or ZeroTuning; none with `--kind`.
        kind: A map of all heads instead, for HeadAblation: `visual`: which look at what is named
            next, on pictures whose objects have places. `text`: which copy from a text.
        output: Where the configuration is written, trials beside it; or the map. Default:
            heads.yaml, for maps heads.json.
        threshold: Maps: heads of the kind have more than this.
        rank: Maps: what heads are ranked by. Default: `hit_rate`, for text `set_score`. Another
            value of the map, or for visual heads `query_norm`, the size of a head's query.
        figure: Maps: where the whole map is drawn, too, a .png or .svg.
        skip_bad: Heads that copy: texts without their needle are left out and counted; they are an
            error otherwise.
        instances: Visual heads: boxes of real pictures, an instances*.json in COCO format; the
            pictures lie in `--images`. Default: the embedded world.
        layer: Layers whose heads are tried (repeatable). Default: for ACT 2 to the last but one,
            for ZeroTuning all.
        gain: A head is chosen if it raises accuracy by at least this. 0 keeps every head under
            which accuracy does not fall, as ACT's authors do; ZeroTuning also needs the other
            direction to be worse.
        beta: ACT: fraction of a sink's attention that is kept.
        theta: ACT: least mean attention of a sink.
        gamma: ZeroTuning: every head is tried with this factor (above 1) and with its inverse.
        max_new_tokens: Longest answer. Default: 2, whose first words are compared with the label;
            for visual heads 84, for text 50.
        batch_size: Questions at once.
        data: Which questions.
        model: The model.
    """

    method: Literal["", "ACT", "ZeroTuning"] = ""
    kind: Literal["", "visual", "text"] = field(default="", metadata={"alias": "--kind"})
    output: Path | None = None
    threshold: float = 0.1
    rank: str = field(default="", metadata={"alias": "--rank"})
    figure: Path | None = field(default=None, metadata={"alias": "--figure"})
    skip_bad: bool = False
    instances: Path | None = field(default=None, metadata={"alias": "--instances"})
    layer: tuple[int, ...] = field(default=(), metadata={"alias": "--layer"})
    gain: float = 0.0
    beta: float = 0.4
    theta: float = 0.1
    gamma: float = 1.5
    max_new_tokens: int | None = None
    batch_size: int = 32
    data: QuestionOptions = field(default_factory=QuestionOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If one is out of range.
        """
        if bool(self.method) == bool(self.kind):
            raise ValueError(
                f"give a method (ACT or ZeroTuning) or --kind, got {self.method!r} and "
                f"{self.kind!r}"
            )
        self._check_map()
        if not self.gamma > 1:
            raise ValueError(f"gamma must be above 1 (its inverse is tried too), got {self.gamma}")
        if not 0 <= self.gain < 1:
            raise ValueError(f"gain must be at least 0 and below 1, got {self.gain}")
        if not 0 < self.data.held_out < 1:
            raise ValueError(f"data.held_out must be between 0 and 1, got {self.data.held_out}")
        if self.data.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.data.seed}")
        for name in ("max_new_tokens", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.data.count is not None and self.data.count < 2:
            raise ValueError(f"count must be at least 2, got {self.data.count}")

    def _check_map(self) -> None:
        """Checks what is for maps."""
        if not 0 < self.threshold < 1:
            raise ValueError(f"threshold must be above 0 and below 1, got {self.threshold}")
        if self.rank and self.rank not in _RANKS.get(self.kind, ()):
            known = ", ".join(_RANKS.get(self.kind, ())) or "--rank is for maps (--kind)"
            raise ValueError(f"rank must be one of: {known}; got {self.rank!r}")
        if self.figure is not None:
            if not self.kind:
                raise ValueError("--figure is for maps (--kind)")
            if self.figure.suffix not in (".png", ".svg") or not self.figure.parent.is_dir():
                raise ValueError(
                    f"--figure must be a .png or .svg in a folder that is there, got {self.figure}"
                )
        if self.skip_bad and self.kind != "text":
            raise ValueError("--skip_bad is for --kind text")
        if self.instances is not None and self.kind != "visual":
            raise ValueError("--instances is for --kind visual")


def run(settings: Calibrate, terminal: Terminal) -> int:
    """Measures a map, or tries every head and writes those that help.

    Raises:
        MmlmError: For everything that makes it impossible, before any work.
    """
    if settings.kind:
        return head_maps.run(
            settings.kind,
            settings.output or Path("heads.json"),
            settings.data,
            instances=settings.instances,
            figure=settings.figure,
            skip_bad=settings.skip_bad,
            threshold=settings.threshold,
            rank=settings.rank or _RANKS[settings.kind][0],
            max_new_tokens=settings.max_new_tokens or (84 if settings.kind == "visual" else 50),
            batch_size=settings.batch_size,
            model_options=settings.model,
            terminal=terminal,
        )
    output, tokens = settings.output or Path("heads.yaml"), settings.max_new_tokens or TOKENS
    return _search(replace(settings, output=output, max_new_tokens=tokens), terminal)


def _search(settings: Calibrate, terminal: Terminal) -> int:
    """Tries every head, chooses, checks the choice on other questions, and writes it."""
    assert settings.output is not None
    common.check_output(settings.output)
    asked = labelled_questions(settings.data)
    n_held_out = max(1, round(len(asked) * settings.data.held_out))
    if n_held_out >= len(asked):
        raise InputError(
            f"There are {len(asked)} questions, of which {n_held_out} would be held out.",
            advice="Give more questions, or a smaller --data.held_out.",
        )
    model, processor = open_model(settings.model, (), terminal)
    import mmlm
    from mmlm.runner import fingerprint

    trials = Trials(settings, mmlm.Anatomy(model))
    path = settings.output.with_name(settings.output.name + ".trials.jsonl")
    run_record = {**_run_record(settings, asked), "weights": fingerprint(model)}
    with RecordFile(path, run_record) as records:
        search = Judge(model, processor, asked[:-n_held_out], settings)
        for name, methods in _shown(trials.all, records.done, terminal):
            records.append([{"id": name, "accuracy": search.accuracy(methods)}])
        accuracy = {name: line["accuracy"] for name, line in records.done.items()}
        chosen = trials.choose(accuracy, settings.gain)
        report = _report(settings, trials, accuracy, chosen, len(asked) - n_held_out)
        if chosen:
            check = Judge(model, processor, asked[-n_held_out:], settings)
            report["chosen"] = search.accuracy(chosen)
            report["held_out"] = {
                "questions": n_held_out,
                "plain": check.accuracy(()),
                "chosen": check.accuracy(chosen),
            }
    if chosen:
        common.write_config(settings.output, _remarks(report), chosen)
    if terminal.json:
        terminal.emit(report)
    else:
        _show(settings, report, terminal)
    return DONE


def _shown(
    trials: Mapping[str, Sequence[Method]], done: Mapping[str, Any], terminal: Terminal
) -> Iterable[tuple[str, Sequence[Method]]]:
    """The trials that are not done, with a progress bar."""
    missing = [(name, methods) for name, methods in trials.items() if name not in done]
    if done and missing:
        terminal.note(f"{len(done)} of {len(trials)} trials were done; going on.")
    return tracked(missing, terminal.progress, "trials")


def _run_record(settings: Calibrate, asked: Sequence[Labelled]) -> dict[str, Any]:
    """Everything that determines the accuracies; ``information`` is what does not."""
    model, data = asdict(settings.model), asdict(settings.data)
    path = settings.data.questions
    given = (
        {"hash": file_hash(path)}
        if path is not None
        else {name: data[name] for name in ("split", "kind", "seed")}
    )
    return {
        "command": "calibrate heads",
        "method": settings.method,
        "model": {name: model[name] for name in ("id", "dtype", "attention", "chat_template")},
        "questions": given | {"count": len(asked), "held_out": settings.data.held_out},
        "max_new_tokens": settings.max_new_tokens,
        INFORMATION: {"device": settings.model.device, "batch_size": settings.batch_size},
    }


def _report(
    settings: Calibrate,
    trials: Trials,
    accuracy: Accuracy,
    chosen: Sequence[Method],
    n_questions: int,
) -> dict[str, Any]:
    plain = accuracy["plain"]
    tried = {name: accuracy[name] for name in trials.all}
    return {
        "method": settings.method,
        "model": settings.model.id,
        "questions": n_questions,
        "plain": plain,
        "trials": {name: value for name, value in tried.items() if name != "plain"},
        "better": sum(value > plain for value in tried.values()),
        "worse": sum(value < plain for value in tried.values()),
        "methods": [method.text for method in chosen],
        "output": str(settings.output) if chosen else None,
    }


def _remarks(report: dict[str, Any]) -> list[str]:
    held_out = report["held_out"]
    return [
        "mmlm generate --config THIS_FILE --input questions.jsonl --output answers.jsonl",
        f"mmlm calibrate heads {report['method']} on model {report['model']}: of "
        f"{len(report['trials'])} trials {report['better']} were better than plain, "
        f"{report['worse']} worse.",
        f"Accuracy on its {report['questions']} questions: plain {report['plain']:.1%}, chosen "
        f"heads together {report['chosen']:.1%}.",
        f"Accuracy on {held_out['questions']} others: plain {held_out['plain']:.1%}, chosen "
        f"{held_out['chosen']:.1%}.",
    ]


def _show(settings: Calibrate, report: dict[str, Any], terminal: Terminal) -> None:
    from rich.table import Table

    table = Table("trial", "accuracy", "plain", title=f"{report['questions']} questions")
    ranked = sorted(report["trials"].items(), key=lambda item: -item[1])
    for name, value in [*ranked[:5], *ranked[5:][-5:]]:
        table.add_row(name, f"{value:.1%}", f"{report['plain']:.1%}")
    terminal.table(table)
    if not report["methods"]:
        terminal.say(
            f"No head of {len(report['trials'])} trials is chosen: {report['better']} were better "
            f"than plain, {report['worse']} worse. Nothing was written."
        )
        return
    held_out = report["held_out"]
    terminal.say(
        f"Together {report['chosen']:.1%}; on {held_out['questions']} other questions "
        f"{held_out['chosen']:.1%}, plain {held_out['plain']:.1%}. Written to {settings.output}."
    )


COMMAND = Command(
    summary="attention heads for ACT or ZeroTuning, or a map of all heads (--kind)",
    settings=Calibrate,
    run=run,
    positional=("method",),
    example=(
        "mmlm calibrate heads ACT --output act.yaml\n"
        "mmlm calibrate heads ZeroTuning --model ./my-model --questions labelled.jsonl\n"
        "mmlm calibrate heads --kind visual --output heads.json --figure heads.png"
    ),
)
