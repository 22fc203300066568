"""``mmlm compare``: runs of one benchmark against a baseline, in numbers and in pictures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.cli.frame import DONE, SOME_FAILED, Command, Terminal
from mmlm.errors import ImageReadError, InputError

if TYPE_CHECKING:
    from PIL import Image

    from benchmarks.reports.comparison import Comparison
    from benchmarks.reports.stored_runs import StoredRun

__all__ = ["COMMAND", "Compare"]

REPORT = "report.html"
RESULTS = "compare.json"


@dataclass(frozen=True)
class Compare:
    """Options of ``mmlm compare``.

    Attributes:
        runs: Output folders of `mmlm bench`, or files of answers; the first is the baseline.
        output: Folder for report.html and compare.json.
        images: Folder of the pictures, if they are no longer where the runs had them.
        benchmark: Which benchmark the answers are of; for files without a run record.
        variant: Variant of the scorer for all runs. Default: the one they were scored with.
        annotations: Where the truth of captions is now (instances.json; repeatable).
        references: Reference captions (captions.json; repeatable).
        metric: A metric to show (repeatable). Default: all.
        resamples: Resamples of the bootstrap.
        seed: Seed of the bootstrap.
    """

    runs: tuple[Path, ...]
    output: Path = Path("compare")
    images: Path | None = None
    benchmark: str | None = None
    variant: str | None = None
    annotations: tuple[Path, ...] = field(default=(), metadata={"alias": "--annotations"})
    references: tuple[Path, ...] = field(default=(), metadata={"alias": "--references"})
    metric: tuple[str, ...] = field(default=(), metadata={"alias": "--metric"})
    resamples: int = 1000
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the ranges.

        Raises:
            ValueError: For a value out of range.
        """
        if self.resamples < 1:
            raise ValueError(f"resamples must be at least 1, got {self.resamples}")
        if self.seed < 0:
            raise ValueError(f"seed must not be negative, got {self.seed}")


def run(settings: Compare, terminal: Terminal) -> int:
    """Compares runs.

    Returns:
        ``DONE``, or ``SOME_FAILED`` if requests failed (in all runs: else they are refused).
    """
    from benchmarks.reports import comparable, comparison
    from benchmarks.reports.compare_page import GENERATOR
    from mmlm import pages

    labels = _labels(settings.runs)
    pages.claim(settings.output / REPORT, GENERATOR)
    if settings.images is not None and not settings.images.is_dir():
        raise InputError(f"There is no folder {str(settings.images)!r}.", advice="Check --images.")
    runs = {label: _read(path, settings) for label, path in zip(labels, settings.runs, strict=True)}
    comparable.check_comparable(runs)
    notes = comparable.other_differences(runs)
    if failed := next(iter(runs.values())).failed:
        notes.append(f"{failed} requests failed in every run and are left out.")
    compared = comparison.compare(
        [comparison.Contender(label, stored.scored) for label, stored in runs.items()],
        metrics=settings.metric,
        resamples=settings.resamples,
        seed=settings.seed,
    )
    _write(settings, runs, compared, notes, terminal)
    return SOME_FAILED if failed else DONE


def _read(path: Path, settings: Compare) -> StoredRun:
    from benchmarks.reports.stored_runs import read_run

    moved = {name: getattr(settings, name) for name in ("annotations", "references")}
    return read_run(
        path,
        benchmark=settings.benchmark,
        variant=settings.variant,
        information={name: [str(p) for p in paths] for name, paths in moved.items() if paths},
    )


def _write(
    settings: Compare,
    runs: Mapping[str, StoredRun],
    compared: Comparison,
    notes: Sequence[str],
    terminal: Terminal,
) -> None:
    """Shows the tables, writes the page and the numbers."""
    from benchmarks.reports import compare_page, compare_tables
    from mmlm.records import write_json

    result = compare_tables.as_json(compared) | {
        "notes": list(notes),
        "runs": {label: _described(stored) for label, stored in runs.items()},
    }
    folders = [stored.pictures for stored in runs.values()]
    page = compare_page.Page(
        comparison=compared,
        notes=notes,
        facts=_facts(settings, runs),
        picture=_finder([settings.images] if settings.images else folders),
    )
    settings.output.mkdir(parents=True, exist_ok=True)
    (settings.output / REPORT).write_text(compare_page.render(page), encoding="utf-8")
    write_json(settings.output / RESULTS, result)
    for table in compare_tables.terminal(compared):
        terminal.table(table)
    for note in notes:
        terminal.note(note)
    terminal.say(f"Pictures and details: {settings.output / REPORT}")
    if terminal.json:
        terminal.emit(result)


def _labels(paths: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that tell them apart.

    Raises:
        InputError: If there are fewer than two runs, or one is given twice.
    """
    if len(paths) < 2:
        raise InputError(
            "A comparison needs at least two runs.", advice="Write: mmlm compare BASELINE OTHER"
        )
    parts = [path.resolve().parts for path in paths]
    if len(set(parts)) < len(parts):
        raise InputError("The same run is given twice.", advice="Give every run once.")
    for length in range(1, max(map(len, parts)) + 1):
        labels = ["/".join(part[-length:]) for part in parts]
        if len(set(labels)) == len(labels):
            return labels
    return [str(path) for path in paths]


def _described(stored: StoredRun) -> dict[str, Any]:
    known = {name: stored.record.get(name) for name in ("model", "methods", "generate")}
    return {"file": str(stored.path), "answers": len(stored.lines), "failed": stored.failed} | known


def _facts(settings: Compare, runs: Mapping[str, StoredRun]) -> dict[str, str]:
    from importlib.metadata import version

    facts = {}
    for label, stored in runs.items():
        methods = ", ".join(stored.record.get("methods", ())) or "no method"
        model = stored.record.get("model", {})
        loaded = f", {model['id']} ({model.get('dtype')})" if "id" in model else ""
        origin = f"{methods}{loaded}" if stored.record else "no run record"
        facts[label] = f"{origin}; {stored.path}"
    facts["bootstrap"] = f"{settings.resamples} resamples of pictures, seed {settings.seed}"
    return facts | {"version": f"mmlm {version('mmlm')}"}


def _finder(folders: Sequence[Path | None]) -> Callable[[str], Image.Image | None]:
    """Finds and reads a picture by the name that its answers know it by."""
    from mmlm.inputs import load_image

    known = [folder for folder in dict.fromkeys(folders) if folder is not None]

    def find(name: str) -> Image.Image | None:
        for path in (folder / spelling for folder in known for spelling in _spellings(name)):
            if path.is_file():
                try:
                    return load_image(path)
                except ImageReadError:
                    return None  # the page says that the picture is missing, and which
        return None

    return find


def _spellings(name: str) -> Iterator[str]:
    """File names of a picture; captions from elsewhere know COCO's pictures by number only."""
    yield name
    if re.fullmatch(r"\d{1,12}", name):
        yield f"COCO_val2014_{int(name):012d}.jpg"
        yield f"{int(name):012d}.jpg"
        yield f"{name}.jpg"
        yield f"{name}.png"


COMMAND = Command(
    summary="compare runs of one benchmark with a baseline, in numbers and in pictures",
    settings=Compare,
    run=run,
    positional=("runs",),
    example=(
        "mmlm compare runs/plain runs/vhr\n"
        "mmlm compare runs/plain runs/vhr runs/vcd --output runs/compared --metric chair_i\n"
        "mmlm compare plain.jsonl other.jsonl --benchmark chair --images val2014"
    ),
)
