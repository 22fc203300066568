"""``mmlm calibrate conflict-heads``: which heads follow the image, and which the prior, for PH3."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.calibrate.common import check_output
from mmlm.cli.calibrate.conflict_samples import Batches, SampleOptions, samples
from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import ModelOptions, method_field, open_model, parse_methods
from mmlm.errors import InputError

if TYPE_CHECKING:
    from decoding.conflict_heads import Halves, Measured
    from decoding.head_records import HeadRecord
    from mmlm.engine.head_maps import Head
    from mmlm.engine.method import Method

__all__ = ["COMMAND", "FRACTIONS", "Calibrate", "best_fraction", "run"]

FRACTIONS = (0.005, 0.01, 0.02, 0.03, 0.05, 0.07, 0.1)
"""Shares of all heads that are tried."""
_SHOWN = 10


@dataclass(frozen=True)
class Calibrate:
    """Options of ``mmlm calibrate conflict-heads``.

    Attributes:
        output: Where the file of heads is written.
        form: Path patching with the MLPs behind a head answering to it, or directly.
        score: By what memory heads are ranked: path patching, direct attribution, or their sum.
            `lens`: both kinds as SeeingKnowing's authors do, by how often a head alone prefers an
            answer, 20 of each.
        significance: Standard errors by which a head's mean must be clear of 0.
        protect_layers: First layers of which no head is listed.
        protect: Further heads that are never listed (repeatable): LAYER.HEAD, or a file of
            `mmlm calibrate heads --kind text`, whose heads copy text and keep it fluent.
        method: Methods that are attached meanwhile; the heads are then valid beside them.
        batch_size: Samples at once.
        data: Which samples.
        model: The model.
    """

    output: Path = Path("heads.json")
    form: Literal["mlp_recomputed", "direct"] = field(
        default="mlp_recomputed", metadata={"alias": "--form"}
    )
    score: Literal["sum", "patching", "attribution", "lens"] = field(
        default="patching", metadata={"alias": "--score"}
    )
    significance: float = 2.0
    protect_layers: int = 2
    protect: tuple[str, ...] = field(default=(), metadata={"alias": "--protect"})
    method: tuple[str, ...] = method_field()
    batch_size: int = 16
    data: SampleOptions = field(default_factory=SampleOptions)
    model: ModelOptions = field(default_factory=ModelOptions)

    def __post_init__(self) -> None:
        """Checks the numbers.

        Raises:
            ValueError: If one is out of range.
        """
        if not self.significance >= 0:
            raise ValueError(f"significance must be at least 0, got {self.significance}")
        if self.protect_layers < 0:
            raise ValueError(f"protect_layers must not be negative, got {self.protect_layers}")
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        self.protected()

    def protected(self) -> tuple[Head, ...]:
        """The heads behind ``protect``.

        Raises:
            ValueError: If one is neither of the form LAYER.HEAD nor such a file.
        """
        found: list[Head] = []
        for text in self.protect:
            if text.endswith(".json"):
                from mmlm.engine.head_maps import HeadMap

                found.extend(HeadMap.load(text).heads)
                continue
            layer, dot, head = text.partition(".")
            if not (dot and layer.isdecimal() and head.isdecimal()):
                raise ValueError(f"protect must be LAYER.HEAD, e.g. 3.1, or a file, got {text!r}")
            found.append((int(layer), int(head)))
        return tuple(found)


def run(settings: Calibrate, terminal: Terminal) -> int:
    """Measures every head on the samples, lists them, and tunes how many to prune.

    Raises:
        MmlmError: For everything that makes it impossible, before any work.
    """
    from decoding.head_records import read_record

    check_output(settings.output, read_record, "is no file of conflict heads")
    found = samples(settings.data)
    methods = parse_methods(settings.method)
    model, processor = open_model(settings.model, methods, terminal)
    from decoding.conflict_heads import select
    from decoding.conflict_runs import make_record, mean_feature, measure
    from decoding.head_records import write_record
    from mmlm import attach

    batches = Batches(model, processor, found, settings.data, settings.batch_size)
    options = {
        "significance": settings.significance,
        "score": settings.score,
        "protect": settings.protected(),
        "protect_layers": settings.protect_layers,
    }
    try:
        with attach(model, *methods, processor=processor):
            mean = mean_feature(model, batches) if settings.data.corruption == "mean" else None
            shown = _shown(batches, terminal)
            measured = measure(model, shown, form=settings.form, score=settings.score, mean=mean)
        halves = select(measured)
    except ValueError as error:
        raise InputError(
            str(error), advice="See `mmlm calibrate conflict-heads --help`."
        ) from error
    record = make_record(
        model,
        measured,
        halves,
        _settings(settings),
        name=settings.model.id,
        methods=[method.text for method in methods],
        **options,
    )
    sweep = _Sweep(model, processor, methods, batches.only(halves[1]))
    record = sweep.tuned(record, _lists_of_first(measured, halves, options))
    write_record(settings.output, record)
    if terminal.json:
        terminal.emit(_report(settings, record))
    else:
        _show(settings, record, terminal)
    return DONE


def _settings(settings: Calibrate) -> dict[str, Any]:
    data = settings.data
    source: dict[str, Any] = {
        "source": "world" if data.instances is None else data.instances.name,
        "kinds": list(data.kind) or "all",
        "count": data.count,
        "first": data.first,
        "seed": data.seed,
        "corruption": data.corruption,
        "prior": data.prior,
        "form": settings.form,
    }
    return source


def _shown(batches: Batches, terminal: Terminal) -> Any:
    from rich.progress import track

    return track(batches, total=len(batches), description="samples", disable=not terminal.progress)


def _lists_of_first(
    measured: Measured, halves: Halves, options: Mapping[str, Any]
) -> dict[str, tuple[Head, ...]]:
    """Heads to prune towards either side, as the first half of the samples has them."""
    import torch

    from decoding.conflict_heads import balanced, list_heads

    first = torch.zeros(len(measured.kinds), dtype=torch.bool)
    first[list(halves[0])] = True
    lists = list_heads(measured, balanced(measured, first), **options)
    return {"image": lists.memory, "memory": lists.image}


def best_fraction(
    shares: Sequence[tuple[float, float]], plain: float, towards: str
) -> float | None:
    """The fraction with the best share of memory answers, the smallest of equal ones.

    Args:
        shares: (fraction, share of memory answers).
        plain: The share with all heads.
        towards: "image" wants few of them, "memory" many.

    Returns:
        None if no fraction is better than all heads.
    """
    sign = 1 if towards == "image" else -1
    better = [one for one in shares if sign * (one[1] - plain) < 0]
    return min(better, key=lambda one: (sign * one[1], one[0]))[0] if better else None


class _Sweep:
    """Tries how many heads to prune, on samples that did not find them."""

    def __init__(
        self, model: Any, processor: Any, methods: Sequence[Method], batches: Batches
    ) -> None:
        self.model, self.processor, self.methods = model, processor, methods
        self.batches = batches

    def tuned(self, record: HeadRecord, lists: Mapping[str, tuple[Head, ...]]) -> HeadRecord:
        """The record with the fractions that were best."""
        n_layers, n_heads = record.shape
        sweep: dict[str, Any] = {"plain": self.share(())}
        fraction: dict[str, float] = {}
        for towards, ranked in lists.items():
            known: dict[int, float] = {}
            shares = []
            for tried in FRACTIONS if ranked else ():
                count = min(len(ranked), max(1, round(tried * n_layers * n_heads)))
                if count not in known:
                    known[count] = self.share(ranked[:count])
                shares.append((tried, known[count]))
            best = best_fraction(shares, sweep["plain"], towards)
            if best is not None:
                fraction[towards] = best
            sweep[towards] = [list(one) for one in shares]
        return replace(record, fraction=fraction, sweep=sweep)

    def share(self, heads: Sequence[Head]) -> float:
        """Share of memory answers with these heads pruned."""
        from decoding.conflict_runs import differences
        from decoding.ph3 import PH3
        from mmlm import attach
        from mmlm.engine.selections import by_layer

        pruned = (PH3(heads_by_layer=by_layer(heads)),) if heads else ()
        with attach(self.model, *self.methods, *pruned, processor=self.processor):
            found = differences(self.model, self.batches)
        return round(float((found < 0).double().mean()), 4)


def _report(settings: Calibrate, record: HeadRecord) -> dict[str, Any]:
    lists = record.lists
    return {
        "model": record.model,
        "samples": record.samples,
        "image": [list(head) for head in lists.image],
        "memory": [list(head) for head in lists.memory],
        "removed": {why: [list(head) for head in found] for why, found in lists.removed.items()},
        "split_half": lists.split_half,
        "unstable": record.unstable,
        "fraction": record.fraction,
        "sweep": record.sweep,
        "output": str(settings.output),
    }


def _show(settings: Calibrate, record: HeadRecord, terminal: Terminal) -> None:
    from rich.table import Table

    counts, lists = record.samples, record.lists
    table = Table(
        "", "image heads", "I", "memory heads", "I", "J",
        title=f"{counts['kept']} torn samples of {counts['samples']}",
    )  # fmt: skip

    def value(name: str, head: Head) -> str:
        return f"{record.values[name][head[0]][head[1]]:+.3f}"

    for rank in range(min(_SHOWN, max(len(lists.image), len(lists.memory)))):
        cells = [str(rank + 1)]
        image, memory = (kind[rank : rank + 1] for kind in (lists.image, lists.memory))
        cells += [f"{h[0]}.{h[1]}" for h in image] or [""]
        cells += [value("pushes", h) for h in image] or [""]
        cells += [f"{h[0]}.{h[1]}" for h in memory] or [""]
        for name in ("remembers", "says"):
            cells += [value(name, h) for h in memory] or [""]
        table.add_row(*cells)
    terminal.table(table)
    for why, heads in lists.removed.items():
        found = ", ".join(f"{layer}.{head}" for layer, head in heads)
        terminal.say(f"Not listed, {why}: {found or 'none'}.")
    terminal.say(f"Rank correlation of two halves of the samples: {lists.split_half}.")
    for towards in ("image", "memory"):
        shares = dict(tuple(one) for one in record.sweep[towards])
        share, plain = record.fraction.get(towards), record.sweep["plain"]
        tried = ", ".join(f"{tried:.1%}: {value:.1%}" for tried, value in shares.items())
        terminal.say(
            f"towards={towards!r}, heads of one half tried on the other, where {plain:.1%} of "
            f"answers follow memory: {tried or 'no heads'}. "
            + ("None is better." if share is None else f"Best: {share:.1%}.")
        )
    terminal.say(f"Written to {settings.output}.")


COMMAND = Command(
    summary="heads that follow the image, and heads that repeat the prior, for PH3",
    settings=Calibrate,
    run=run,
    example=(
        "mmlm calibrate conflict-heads --output heads.json\n"
        "mmlm calibrate conflict-heads --model ./my-model --instances instances_train2014.json "
        "--images train2014 --output heads.json\n"
        "mmlm generate --method \"PH3(heads_file='heads.json')\" "
        "--input in.jsonl --output out.jsonl"
    ),
)
