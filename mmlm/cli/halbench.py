"""What `bench object-halbench` and `score object-halbench` share: how answers become scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.cli.judging import JudgeOptions, open_judge
from mmlm.errors import InputError

if TYPE_CHECKING:
    from benchmarks.base import Scores
    from benchmarks.object_halbench.objects import Phrases
    from mmlm.cli.frame import Terminal

__all__ = ["ReadingOptions", "Scorer", "scorer"]

TEMPERATURE = 0.2
"""The authors' judge is not deterministic: gpt-3.5-turbo-0613 at this temperature."""

Scorer = Callable[[Sequence[Mapping[str, Any]], Path], "Scores"]
"""Scores lines; judged lines are written beside the given file of answers."""


@dataclass(frozen=True, kw_only=True)
class ReadingOptions:
    """How answers are read; every choice is part of the metric's name.

    Attributes:
        annotations: Objects in the pictures (instances*.json of COCO; repeatable); officially
            those of train2014 and val2014. Default: the table of val2014 that ships with mmlm.
        references: Reference captions (captions*.json of COCO; repeatable).
        extraction: `auto`: by the judge's lists, if the answers have been judged; `words`: by the
            answers' own words, without a judge.
        phrases: How a judge's phrases are read. `spacy`: as the authors do; `rules`: ours, without
            spaCy.
        spacy_model: Pipeline of spaCy.
        template: The judge's prompt, a text file with {} for question and answer. Default: ours.
        role: Message that holds the prompt; the authors send it as system message.
        judge: Who lists the objects.
    """

    annotations: tuple[Path, ...] = field(default=(), metadata={"alias": "--annotations"})
    references: tuple[Path, ...] = field(default=(), metadata={"alias": "--references"})
    extraction: Literal["auto", "words"] = "auto"
    phrases: Literal["rules", "spacy"] = "rules"
    spacy_model: str = "en_core_web_trf"
    template: Path | None = None
    role: Literal["system", "user"] = "system"
    judge: JudgeOptions = dataclasses.field(default_factory=JudgeOptions)


def scorer(options: ReadingOptions, terminal: Terminal) -> Scorer:
    """Reads everything that scoring needs, and refuses what is missing before any work.

    Raises:
        InputError: If options contradict each other, or a file or package is missing.
    """
    from benchmarks import object_halbench
    from benchmarks.judges import judged

    if options.extraction == "words" and options.judge.kind != "none":
        raise InputError(
            "--extraction words asks no judge, but one is named.", advice="Leave one of them out."
        )
    judge = open_judge(options.judge, terminal, temperature=TEMPERATURE)
    reader = _reader(options)
    truth = object_halbench.read_truth(options.annotations, options.references)
    template = object_halbench.PROMPT
    if options.template is not None:
        template = judged.read_template(options.template, ("question", "answer"))

    def score(lines: Sequence[Mapping[str, Any]], path: Path) -> Scores:
        if judge is not None:
            lines = object_halbench.ask(lines, judge, template=template, role=options.role)
            judged.write_judged(judged.judged_path(path), lines)
        return object_halbench.score_stored(
            lines, truth=truth, phrases=reader, extraction=options.extraction
        )

    return score


def _reader(options: ReadingOptions) -> Phrases:
    from benchmarks.object_halbench.objects import RulePhrases, SpacyPhrases

    return RulePhrases() if options.phrases == "rules" else SpacyPhrases(options.spacy_model)
