"""``mmlm score chair``: count invented objects in stored captions."""

from __future__ import annotations

import json
from collections.abc import Mapping
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
        baseline: Captions of the same pictures to compare with, e.g. those of the plain model.
    """

    annotations: tuple[Path, ...] = field(default=(), metadata={"alias": "--annotations"})
    references: tuple[Path, ...] = field(default=(), metadata={"alias": "--references"})
    variant: Literal["wordnet", "pattern"] = "wordnet"


def run(settings: ScoreChair, terminal: Terminal) -> int:
    """Scores captions."""
    from benchmarks import chair, tables

    truth = _truth(settings)

    def score(path: Path) -> ChairResult:
        captions = chair.read_captions(path)
        pictures = {caption["image_id"] for caption in captions}
        unknown = pictures - truth.keys()
        if pictures and unknown == pictures:
            raise InputError(
                f"None of the {len(unknown)} pictures in {path} is in the annotations.",
                advice="Give the --annotations that belong to these captions.",
            )
        if unknown:
            terminal.note(
                f"{len(unknown)} pictures are not in the annotations: all their objects count as "
                f"invented, e.g. those of {min(unknown)}."
            )
        return chair.score(captions, truth, settings.variant)

    return show(settings, terminal, score, table=tables.chair_table)


def _truth(settings: ScoreChair) -> dict[int, set[str]]:
    from benchmarks import chair

    if settings.annotations:
        return chair.truth_from_coco(settings.annotations, settings.references, settings.variant)
    if settings.references:
        raise InputError(
            "--references is given without --annotations.", advice="Give the instances as well."
        )
    stored = _files_of_run(settings.file)
    if stored["annotations"]:
        return chair.truth_from_coco(stored["annotations"], stored["references"], settings.variant)
    return chair.truth_of_val2014()


def _files_of_run(path: Path) -> dict[str, list[str]]:
    """The annotation files named in the run record beside the captions, if there is one."""
    record = run_record_path(path)
    information: Mapping[str, Any] = {}
    if record.is_file():
        information = json.loads(record.read_text(encoding="utf-8")).get(INFORMATION, {})
    return {name: list(information.get(name, ())) for name in ("annotations", "references")}


COMMAND = Command(
    summary="count invented objects in captions",
    settings=ScoreChair,
    run=run,
    positional=("file",),
    example=(
        "mmlm score chair bench/chair/captions.jsonl\n"
        "mmlm score chair with_method.jsonl --baseline plain.jsonl --variant pattern"
    ),
)
