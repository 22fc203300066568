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

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from benchmarks import stats
from benchmarks.base import CountTable, Measure, Ratio, read_records
from benchmarks.coco import subset_ids, truth_from_coco, truth_of_val2014
from benchmarks.objects import (
    VARIANTS,
    CaptionWords,
    Mention,
    Variant,
    caption_words,
    check_variant,
    mentions,
    node_of_word,
    node_words,
    without_toilet_seats,
)
from mmlm.errors import InputError

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "METRICS",
    "VARIANTS",
    "CaptionScore",
    "CaptionWords",
    "ChairResult",
    "Mention",
    "Variant",
    "caption_words",
    "node_words",
    "read_captions",
    "score",
    "score_stored",
    "subset_ids",
    "theme_share",
    "truth_from_coco",
    "truth_of_val2014",
]

IndexScheme = Literal["words", "original", "pai"]

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


@dataclass(frozen=True, slots=True)
class CaptionScore:
    """One scored caption.

    Attributes:
        image_id: The picture.
        caption: The text as given.
        truth: Objects in the picture.
        reading: The caption as CHAIR reads it.
        mentions: Named objects in order, repeats included.
        known_image: Whether the truth has this picture; if not, every mention is hallucinated.
    """

    image_id: int
    caption: str
    truth: frozenset[str]
    reading: CaptionWords
    mentions: tuple[Mention, ...]
    known_image: bool

    @property
    def objects(self) -> list[str]:
        """Named objects in order, repeats included."""
        return [mention.node for mention in self.mentions]

    @property
    def hallucinated(self) -> list[Mention]:
        """Mentions of objects that are not in the picture."""
        return [mention for mention in self.mentions if mention.node not in self.truth]

    def hallucination_idxs(self, scheme: IndexScheme = "words") -> list[int]:
        """Positions of the hallucinated mentions.

        Args:
            scheme: "words": position in `CaptionWords.words`. "original" and "pai" are what the
                scorers of that name store. The original (and OPERA's) gives the position in the
                unmerged token list, but reads it from a list out of which a dropped "seat" was
                not taken, so it is wrong after one. PAI's gives the position in the merged list
                after the "seat" was dropped.
        """
        if scheme == "words":
            return [mention.word_index for mention in self.hallucinated]
        rank = {word: i for i, word in enumerate(without_toilet_seats(self.reading.words))}
        ranks = [rank[mention.word_index] for mention in self.hallucinated]
        return ranks if scheme == "pai" else [self.reading.first_token[i] for i in ranks]

    def counts(self) -> dict[str, int]:
        """The row of counts that all metrics are sums of."""
        named = set(self.objects)
        sentences = self.reading.sentences
        return {
            "captions": 1,
            "hallucinated_captions": int(bool(self.hallucinated)),
            "mentions": len(self.mentions),
            "hallucinated_mentions": len(self.hallucinated),
            "named_objects": len(named),
            "found_objects": len(named & self.truth),
            "true_objects": len(self.truth),
            "words": len(self.reading.words),
            "sentences": len(sentences),
            "duplicate_sentences": len(sentences) - len(set(sentences)),
            "captions_of_unknown_images": int(not self.known_image),
        }

    def spans(self) -> list[tuple[int, int, Mention]]:
        """Where the mentions stand in ``caption.lower()``: start, end, mention.

        NLTK rewrites quotation marks, so tokens are found again by searching from left to right;
        a token that was rewritten is skipped.
        """
        text, cursor, places = self.caption.lower(), 0, []
        for token in self.reading.tokens:
            at = text.find(token, cursor)
            places.append((at, at + len(token)) if at >= 0 else (cursor, cursor))
            cursor = places[-1][1]
        return [
            (places[m.token_index][0], places[m.token_index + m.token_count - 1][1], m)
            for m in self.mentions
        ]


@dataclass(frozen=True)
class ChairResult:
    """Scores of a set of captions.

    Attributes:
        variant: The word procedure.
        per_caption: One score per caption, in input order.
        table: Counts per image; intervals and paired differences come from it.
    """

    variant: Variant
    per_caption: tuple[CaptionScore, ...]
    table: CountTable = field(repr=False)

    @property
    def name(self) -> str:
        """Name under which the numbers may be published."""
        return f"chair/{self.variant}"

    @property
    def metrics(self) -> dict[str, float | None]:
        """Every metric as a fraction (`mean_length` in words); None where undefined."""
        return {name: measure.value for name, measure in self.table.measures().items()}

    @property
    def counts(self) -> dict[str, int | float]:
        """The sums behind the metrics, and the number of pictures."""
        return {"images": len(self.table.images), **self.table.sums()}

    def measures(self, *, resamples: int = stats.RESAMPLES, seed: int = 0) -> dict[str, Measure]:
        """Every metric with its counts and a 95 % bootstrap interval over pictures."""
        return self.table.measures(resamples=resamples, seed=seed)

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
        measures = self.measures(resamples=resamples, seed=seed)
        return {
            "metric": self.name,
            "metrics": {name: measure.as_json() for name, measure in measures.items()},
            "counts": self.counts,
            "hallucination_by_sentence": [measure.as_json() for measure in self.by_sentence()],
            "hallucination_by_third": [measure.as_json() for measure in self.by_third()],
        }


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
        captions: Records with ``image_id`` and ``caption``.
        truth: Objects of each picture, by COCO name.
        variant: "wordnet" or "pattern".

    Raises:
        ValueError: If the variant is unknown.
        InputError: If there is no caption, or a record lacks a field.
    """
    check_variant(variant)
    scored = tuple(
        _score_one(*_fields(record, f"caption {number}"), truth, variant)
        for number, record in enumerate(captions)
    )
    if not scored:
        raise InputError("There are no captions to score.", advice="Give at least one caption.")
    rows = [caption.counts() for caption in scored]
    table = CountTable.build([caption.image_id for caption in scored], rows, METRICS)
    return ChairResult(variant, scored, table)


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
    ratios = {
        "theme_share": Ratio(("invented_of_theme",), ("invented",)),
        "chance": Ratio(("absent_of_theme",), ("absent",)),
    }
    return CountTable.build([c.image_id for c in result.per_caption], rows, ratios)


def read_captions(path: str | Path) -> list[dict[str, Any]]:
    """Reads captions to score: JSON lines or a JSON list, plain or gzipped.

    Understood are ``image_id`` and ``caption`` (COCO's result format, and what `mmlm bench chair`
    writes) and the output of `mmlm generate` (``id``, ``text``) whose ids are image numbers.
    Records that carry an ``error`` have no caption and are left out.

    Raises:
        InputError: If the file cannot be read, or a record lacks a field; duplicate ``id`` too.
    """
    return _captions(read_records(path), str(path))


def score_stored(
    lines: Sequence[Mapping[str, Any]],
    truth: Mapping[int, Collection[str]],
    variant: Variant = "wordnet",
) -> ChairResult:
    """Scores the lines that `mmlm bench chair` stores; those with an ``error`` are left out.

    Args:
        lines: The stored lines.
        truth: Objects of each picture, by COCO name.
        variant: "wordnet" or "pattern".

    Raises:
        InputError: If a line lacks a field, an id occurs twice, or no caption is left.
    """
    return score(_captions(lines, "captions"), truth, variant)


def _captions(records: Sequence[Mapping[str, Any]], source: str) -> list[dict[str, Any]]:
    seen: set[str] = set()
    captions = []
    for number, record in enumerate(records, start=1):
        place = f"{source}, record {number}"
        if "id" in record:
            if str(record["id"]) in seen:
                raise InputError(
                    f"{place}: id {record['id']!r} occurs twice.",
                    advice="Keep one record per id; one picture may have several ids.",
                )
            seen.add(str(record["id"]))
        if record.get("error"):
            continue
        image, caption = _fields(record, place)
        captions.append({"image_id": image, "caption": caption})
    return captions


def _score_one(
    image_id: int, caption: str, truth: Mapping[int, Collection[str]], variant: Variant
) -> CaptionScore:
    reading = caption_words(caption, variant)
    return CaptionScore(
        image_id=image_id,
        caption=caption,
        truth=frozenset(truth.get(image_id, ())),
        reading=reading,
        mentions=mentions(reading),
        known_image=image_id in truth,
    )


def _fields(record: Mapping[str, Any], place: str) -> tuple[int, str]:
    image = record.get("image_id", record.get("id"))
    caption = record.get("caption", record.get("text"))
    if not isinstance(caption, str):
        raise InputError(
            f"{place}: no caption (field 'caption' is {caption!r}).",
            advice='Every record needs "image_id" (a number) and "caption" (a text).',
        )
    if isinstance(image, str) and re.fullmatch(r"\d+", image):
        image = int(image)
    if not isinstance(image, int) or isinstance(image, bool):
        raise InputError(
            f"{place}: image_id must be a number, found {image!r}.",
            advice='Every record needs "image_id" (a number) and "caption" (a text).',
        )
    return image, caption
