"""CHAIR: which objects a caption names that are not in the picture.

Paper: Rohrbach et al., "Object Hallucination in Image Captioning", arXiv 1809.02156 (EMNLP 2018).
Two word procedures are in use and give different scores for the same captions (up to 3.4 points of
CHAIR_s), so the variant is part of the metric's name:

* ``chair/wordnet`` (default): part-of-speech tags and WordNet lemmas, as in OPERA's and PAI's
  scorers; this is what papers on vision-language models report. PAI's Precision and F1 included.
* ``chair/pattern``: the singular rules of ``pattern.en``, as in the original scorer.

Both reproduce the authors' numbers exactly, with the surprises that come with them: under
``pattern`` a "bus" is never seen; under ``wordnet`` "men" is nobody and "seated" is a chair.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from benchmarks import stats
from benchmarks.base import Counted, CountTable, Direction, Measure, Ratio, Sample
from benchmarks.chair.captions import CaptionScore
from benchmarks.chair.files import (
    fields_of,
    official_lines,
    read_captions,
    task,
    usable,
    write_official,
)
from benchmarks.coco import subset_ids, truth_from_coco, truth_of_val2014
from mmlm.errors import InputError
from mmlm.language.objects import (
    VARIANTS,
    CaptionWords,
    Mention,
    Variant,
    caption_words,
    check_variant,
    mentions,
    node_of_word,
    node_words,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

__all__ = [
    "METRICS",
    "THEME_RATIOS",
    "VARIANTS",
    "CaptionScore",
    "CaptionWords",
    "ChairResult",
    "Mention",
    "Variant",
    "caption_words",
    "node_words",
    "official_lines",
    "read_captions",
    "score",
    "score_stored",
    "subset_ids",
    "task",
    "theme_share",
    "truth_from_coco",
    "truth_of_val2014",
    "write_official",
]

METRICS: dict[str, Ratio] = {
    "chair_s": Ratio(("hallucinated_captions",), ("captions",)),
    "chair_i": Ratio(("hallucinated_mentions",), ("mentions",)),
    "recall": Ratio(("found_objects",), ("true_objects",)),
    "precision": Ratio(("found_objects",), ("named_objects",)),
    "f1": Ratio(
        ("found_objects",), ("named_objects", "true_objects"), 2.0, needs=("found_objects",)
    ),
    "mean_length": Ratio(("words",), ("captions",)),
    "duplicate_sentence_share": Ratio(("duplicate_sentences",), ("sentences",)),
}
THEME_RATIOS: dict[str, Ratio] = {
    "theme_share": Ratio(("invented_of_theme",), ("invented",)),
    "chance": Ratio(("absent_of_theme",), ("absent",)),
}

_DIRECTIONS: dict[str, Direction] = {
    "chair_s": "lower",
    "chair_i": "lower",
    "recall": "higher",
    "precision": "higher",
    "f1": "higher",
    "mean_length": "none",
    "duplicate_sentence_share": "lower",
}


@dataclass(frozen=True)
class ChairResult(Counted):
    """Scores of a set of captions.

    Attributes:
        variant: The word procedure.
        per_caption: One score per caption, in input order.
        table: Counts per image; intervals and paired differences come from it.
        statuses: How many requests were not scored: ``failed`` (the line holds an error),
            ``missing`` (a picture that should have a caption has no line).
    """

    variant: Variant
    per_caption: tuple[CaptionScore, ...]
    table: CountTable = field(repr=False)
    statuses: Mapping[str, int] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """Name under which the numbers may be published."""
        return f"chair/{self.variant}"

    @property
    def directions(self) -> Mapping[str, Direction]:
        """Which way each metric is better."""
        return _DIRECTIONS

    @property
    def good(self) -> tuple[str, ...]:
        """Objects of the picture that the caption names."""
        return ("found_objects",)

    @property
    def bad(self) -> tuple[str, ...]:
        """Mentions of objects that are not in the picture."""
        return ("hallucinated_mentions",)

    @property
    def samples(self) -> tuple[Sample, ...]:
        """The captions one by one, with the named objects marked."""
        return tuple(caption.sample() for caption in self.per_caption)

    def by_sentence(self) -> list[Measure]:
        """Share of hallucinated mentions in the first, second, ... sentence of the captions."""
        last = max((m.sentence for c in self.per_caption for m in c.mentions), default=-1)
        return self._rates(lambda caption, mention: mention.sentence, last + 1)

    def by_third(self) -> list[Measure]:
        """Share of hallucinated mentions in the first, middle and last third of the sentences."""

        def third(caption: CaptionScore, mention: Mention) -> int:
            return 3 * mention.sentence // (caption.reading.sentence[-1] + 1)

        return self._rates(third, 3)

    def _rates(self, bucket: Callable[[CaptionScore, Mention], int], size: int) -> list[Measure]:
        total, wrong = [0] * size, [0] * size
        for caption in self.per_caption:
            for mention in caption.mentions:
                total[bucket(caption, mention)] += 1
                wrong[bucket(caption, mention)] += mention.node not in caption.truth
        return [
            Measure(bad / count if count else None, bad, count)
            for bad, count in zip(wrong, total, strict=True)
        ]

    def as_json(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Any]:
        """Everything but the captions, as plain JSON."""
        record = super().as_json(resamples=resamples, seed=seed) | {
            "hallucination_by_sentence": [measure.as_json() for measure in self.by_sentence()],
            "hallucination_by_third": [measure.as_json() for measure in self.by_third()],
        }
        if self.statuses:
            record["statuses"] = dict(self.statuses)
        return record


def score(
    captions: Iterable[Mapping[str, Any]],
    truth: Mapping[int, Collection[str]],
    variant: Variant = "wordnet",
) -> ChairResult:
    """Scores captions against the objects in their pictures.

    CHAIR_i = hallucinated mentions / mentions (repeats count); CHAIR_s = captions with at least
    one hallucinated mention / captions; recall and precision pool distinct objects per caption
    over all captions. A picture may be captioned several times. A picture that the truth does not
    know has no objects: everything named is hallucinated, and `counts` tells how many such there
    were.

    Args:
        captions: Records with ``image_id`` and ``caption``; ``id``, ``image`` and ``prompt`` are
            kept for `ChairResult.samples`.
        truth: Objects of each picture, by COCO name.
        variant: "wordnet" or "pattern".

    Raises:
        ValueError: If the variant is unknown.
        InputError: If there is no caption, or a record lacks a field.
    """
    check_variant(variant)
    scored = tuple(
        _score_one(record, f"caption {number}", truth, variant)
        for number, record in enumerate(captions)
    )
    if not scored:
        raise InputError("There are no captions to score.", advice="Give at least one caption.")
    rows = [caption.counts() for caption in scored]
    table = CountTable.build([caption.image_id for caption in scored], rows, METRICS)
    return ChairResult(variant, scored, table)


def score_stored(
    lines: Sequence[Mapping[str, Any]],
    truth: Mapping[int, Collection[str]],
    variant: Variant = "wordnet",
    *,
    expected: Collection[int] = (),
) -> ChairResult:
    """Scores the lines that `mmlm bench chair` stores.

    Lines with an ``error`` are left out and counted in `ChairResult.statuses`.

    Args:
        lines: The stored lines.
        truth: Objects of each picture, by COCO name.
        variant: "wordnet" or "pattern".
        expected: The pictures that were to be captioned, if known; those without a line are
            counted as ``missing``.

    Raises:
        InputError: If a line lacks a field, an id occurs twice, no caption is left, or a picture
            is not among the expected ones.
    """
    captions = usable(lines, "captions")
    failed = len(lines) - len(captions)
    if failed and not captions:
        raise InputError(f"All {failed} lines hold errors.", advice="Repeat the run.")
    result = score(captions, truth, variant)
    pictures = set(result.table.images)
    if expected and (foreign := pictures - set(expected)):
        raise InputError(
            f"{len(foreign)} of the {len(pictures)} captioned pictures are not among the "
            f"{len(set(expected))} that were asked for, e.g. {min(foreign)}.",
            advice="These captions belong to other pictures; give the right file or subset.",
        )
    tried = {str(i) for i in pictures} | {
        str(line.get("image_id")) for line in lines if line.get("error")
    }
    counted = {"failed": failed, "missing": len({str(i) for i in expected} - tried)}
    return replace(result, statuses={name: count for name, count in counted.items() if count})


def theme_share(result: ChairResult, themes: Mapping[int, Collection[str]]) -> CountTable:
    """Which part of the invented objects belongs to the scene of the picture: the prior at work.

    Counts distinct invented objects per caption. The metric ``theme_share`` is to be compared with
    ``chance``, the share of a scene's absent objects among all absent objects, which is what
    uniform guessing would give.

    Args:
        result: Scored captions.
        themes: Objects that usually appear in the scene of each picture.
    """
    everything = set(node_of_word().values())
    rows = []
    for caption in result.per_caption:
        theme = set(themes[caption.image_id])
        invented = {mention.node for mention in caption.hallucinated}
        rows.append(
            {
                "invented": len(invented),
                "invented_of_theme": len(invented & theme),
                "absent": len(everything - caption.truth),
                "absent_of_theme": len(theme - caption.truth),
            }
        )
    return CountTable.build([c.image_id for c in result.per_caption], rows, THEME_RATIOS)


def _score_one(
    record: Mapping[str, Any], place: str, truth: Mapping[int, Collection[str]], variant: Variant
) -> CaptionScore:
    image_id, caption = fields_of(record, place)
    reading = caption_words(caption, variant)
    return CaptionScore(
        image_id=image_id,
        caption=caption,
        truth=frozenset(truth.get(image_id, ())),
        reading=reading,
        mentions=mentions(reading),
        known_image=image_id in truth,
        id=str(record.get("id", "")),
        image=str(record.get("image") or ""),
        question=str(record.get("prompt") or ""),
    )
