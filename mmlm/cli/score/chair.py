"""``mmlm score chair``: count invented objects in stored captions."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.frame import Command, Terminal
from mmlm.cli.score.common import ScoreOptions, show
from mmlm.errors import InputError
from mmlm.records import INFORMATION, run_record_path

if TYPE_CHECKING:
    from benchmarks.chair import ChairResult

__all__ = ["COMMAND", "ScoreChair"]


@dataclass(frozen=True)
class ScoreChair(ScoreOptions):
    """Options of ``mmlm score chair``.

    Attributes:
        file: Captions: JSON lines or a JSON list with `image_id` and `caption`, or the output of
            `mmlm generate` if its ids are image ids.
        annotations: Objects in the pictures (instances.json in COCO format; repeatable). Default:
            those of the run that wrote the captions; else COCO val2014, which ships with mmlm.
        references: Reference captions (captions.json in COCO format; repeatable).
        variant: Word procedure; part of the metric's name.
        subset: The pictures that must be captioned: those of the run; or `opera500`. Others are
            refused, missing ones counted.
        export: Also write the captions in the form that the authors' scripts take: a list
            (*.json) or lines (*.jsonl).
        baseline: Captions of the same pictures to compare with, e.g. those of the plain model.
    """

    annotations: tuple[Path, ...] = field(default=(), metadata={"alias": "--annotations"})
    references: tuple[Path, ...] = field(default=(), metadata={"alias": "--references"})
    variant: Literal["wordnet", "pattern"] = "wordnet"
    subset: Literal["run", "opera500"] = field(default="run", metadata={"alias": "--subset"})
    export: Path | None = None


def run(settings: ScoreChair, terminal: Terminal) -> int:
    """Scores captions."""
    from benchmarks import chair, tables
    from benchmarks.base import read_records

    truth, own = _truth(settings)

    def score(path: Path) -> tuple[ChairResult, int]:
        lines = read_records(path)
        expected = _expected(settings, path) or (truth.keys() if own else ())
        result = chair.score_stored(lines, truth, settings.variant, expected=expected)
        pictures = set(result.table.images)
        unknown = pictures - truth.keys()
        if unknown == pictures:
            raise InputError(
                f"None of the {len(unknown)} pictures in {path} is in the annotations.",
                advice="Give the --annotations that belong to these captions.",
            )
        if unknown:
            terminal.note(
                f"{len(unknown)} pictures are not in the annotations: all their objects count as "
                f"invented, e.g. those of {min(unknown)}."
            )
        if missing := result.statuses.get("missing"):
            terminal.note(f"{missing} of {len(set(expected))} pictures have no caption in {path}.")
        return result, result.statuses.get("failed", 0)

    if settings.export is not None:
        chair.write_official(settings.export, read_records(settings.file))
        terminal.note(f"Captions written to {settings.export}.")
    return show(settings, terminal, score, table=tables.chair_table)


def _truth(settings: ScoreChair) -> tuple[dict[int, set[str]], bool]:
    """Objects of each picture, and whether these are just the pictures of the run."""
    from benchmarks import chair

    if settings.annotations:
        given = chair.truth_from_coco(settings.annotations, settings.references, settings.variant)
        return given, False
    if settings.references:
        raise InputError(
            "--references is given without --annotations.", advice="Give the instances as well."
        )
    record = _run_record(settings.file)
    files = record.get(INFORMATION, {})
    instances, captions = (list(files.get(name, ())) for name in ("annotations", "references"))
    if not instances:
        return chair.truth_of_val2014(), False
    own = "world" in record.get("data", {})
    return chair.truth_from_coco(instances, captions, settings.variant), own


def _expected(settings: ScoreChair, path: Path) -> Collection[int]:
    """The pictures that the subset, or the run record beside the captions, names."""
    from benchmarks import chair

    if settings.subset != "run":
        return chair.subset_ids(settings.subset)
    return _run_record(path).get("data", {}).get("image_ids", ())


def _run_record(path: Path) -> Mapping[str, Any]:
    """The run record beside the captions; empty if there is none."""
    record = run_record_path(path)
    return json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}


COMMAND = Command(
    summary="count invented objects in captions",
    settings=ScoreChair,
    run=run,
    positional=("file",),
    example=(
        "mmlm score chair bench/chair/captions.jsonl\n"
        "mmlm score chair with_method.jsonl --baseline plain.jsonl --variant pattern\n"
        "mmlm score chair captions.jsonl --subset opera500 --strict --export captions.json"
    ),
)
