"""How stored answers of each benchmark are scored: one line per benchmark.

How to add a benchmark: give it a function ``score_stored(lines, ...)`` whose further parameters
have defaults, and a line in `SCORERS`. If it has variants, the line says how the name of a variant
(what stands behind the benchmark's name in ``amber/exact/raw``) becomes parameters.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.base import Scored

__all__ = ["SCORERS", "Scorer", "score_captions", "score_objects"]

Options = Callable[[str], Mapping[str, Any]]


def _none(variant: str) -> Mapping[str, Any]:
    return {}


def _last(name: str) -> Options:
    """The last part of the variant is a parameter of this name."""

    def options(variant: str) -> Mapping[str, Any]:
        return {name: variant.rpartition("/")[2]}

    return options


def _amber(variant: str) -> Mapping[str, Any]:
    from benchmarks.amber.words import similarity

    near, _, answers = variant.partition("/")
    return {"near": similarity(near)} | ({"answers": answers} if answers else {})


def _hallusionbench(variant: str) -> Mapping[str, Any]:
    return {"variant": variant.partition(":")[0]}  # the judge's name stands in the lines


def _text_dominance(variant: str) -> Mapping[str, Any]:
    text, _, rest = variant.partition("/")
    return {"text": text, "first_token": "without-first" not in rest}


@dataclass(frozen=True)
class Scorer:
    """Where a benchmark's ``score_stored`` is, and what it takes.

    Attributes:
        target: ``"module:function"``, imported when it is needed; called with the stored lines.
        options: Turns the name of a variant into parameters.
        facts: Names in the run record's information that it takes as parameters of these names.
    """

    target: str
    options: Options = _none
    facts: tuple[str, ...] = ()

    def __call__(
        self,
        lines: Sequence[Mapping[str, Any]],
        variant: str = "",
        information: Mapping[str, Any] | None = None,
    ) -> Scored:
        """Scores lines.

        Args:
            lines: As stored.
            variant: "" for the benchmark's default.
            information: That part of the run record.

        Raises:
            InputError: If the lines cannot be scored, or there is no such variant.
        """
        known = information or {}
        parameters: dict[str, Any] = {name: known[name] for name in self.facts if name in known}
        module, _, function = self.target.partition(":")
        score = getattr(importlib.import_module(module), function)
        try:
            return score(lines, **parameters, **(self.options(variant) if variant else {}))
        except ValueError as error:  # what functions say of a wrong argument: the variant
            raise InputError(
                f"Variant {variant!r}: {error}", advice="Choose another --variant."
            ) from error


def score_captions(
    lines: Sequence[Mapping[str, Any]],
    annotations: Sequence[str] = (),
    references: Sequence[str] = (),
    variant: str = "wordnet",
) -> Scored:
    """Scores captions against annotation files; without any, against COCO val2014's objects.

    Args:
        lines: Captions as `mmlm bench chair` stores them.
        annotations: Instances in COCO format.
        references: Reference captions in COCO format.
        variant: Word procedure.

    Raises:
        InputError: If a file is missing, or knows none of the pictures.
    """
    from benchmarks import chair

    _check_there(annotations, references)
    truth = (
        chair.truth_from_coco(annotations, references, variant)
        if annotations
        else chair.truth_of_val2014()
    )
    result = chair.score_stored(lines, truth, variant)
    if not set(result.table.images) & truth.keys():
        raise InputError(
            f"None of the {len(result.table.images)} pictures is in the annotations.",
            advice="Give the --annotations that belong to these captions.",
        )
    return result


def score_objects(
    lines: Sequence[Mapping[str, Any]],
    annotations: Sequence[str] = (),
    references: Sequence[str] = (),
) -> Scored:
    """Scores Object HalBench's descriptions: with the judge's lists if the lines have them.

    Args:
        lines: As `mmlm bench object-halbench` stores them.
        annotations: Instances in COCO format; without any, the table of val2014.
        references: Reference captions in COCO format.

    Raises:
        InputError: If a file is missing, or a picture is not in them.
    """
    from benchmarks import object_halbench

    _check_there(annotations, references)
    truth = object_halbench.read_truth(annotations, references)
    return object_halbench.score_stored(lines, truth=truth)


def _check_there(annotations: Sequence[str], references: Sequence[str]) -> None:
    if missing := [name for name in (*annotations, *references) if not Path(name).is_file()]:
        raise InputError(
            f"What is in the pictures of these captions was in {missing[0]}, which is missing.",
            advice="Say where it is now with --annotations (and --references).",
        )


SCORERS = {
    "amber": Scorer("benchmarks.amber:score_stored", _amber),
    "blink": Scorer("benchmarks.multi_image.blink:score_stored", _last("parser")),
    "chair": Scorer(
        "benchmarks.reports.scorers:score_captions", _last("variant"), ("annotations", "references")
    ),
    "hallusionbench": Scorer("benchmarks.hallusionbench:score_stored", _hallusionbench),
    "mantis": Scorer("benchmarks.multi_image.mantis:score_stored"),
    "mmbench": Scorer("benchmarks.mmbench:score_stored"),
    "mme": Scorer("benchmarks.mme:score_stored"),
    "mmhal": Scorer("benchmarks.mmhal:score_stored"),
    "mmir": Scorer("benchmarks.mmir:score_stored"),
    "mmmu": Scorer("benchmarks.multi_image.mmmu:score_stored"),
    "mvbench": Scorer("benchmarks.multi_image.mvbench:score_stored", _last("parser")),
    "nlvr2": Scorer("benchmarks.multi_image.nlvr2:score_stored"),
    "object-halbench": Scorer(
        "benchmarks.reports.scorers:score_objects", facts=("annotations", "references")
    ),
    "pope": Scorer("benchmarks.pope:score_stored", _last("parser")),
    "swapmix": Scorer("benchmarks.swapmix:score_stored"),
    "text-dominance": Scorer("benchmarks.text_dominance:score_stored", _text_dominance),
}
