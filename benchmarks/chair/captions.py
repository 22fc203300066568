"""One caption as CHAIR scores it: the objects it names, where they stand, its own numbers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from benchmarks.base import Mark, Sample
from mmlm.language.objects import CaptionWords, Mention, without_toilet_seats

__all__ = ["CaptionScore", "IndexScheme"]

IndexScheme = Literal["words", "original", "pai"]


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
        id: The stored line's id; "" for captions from elsewhere.
        image: The picture's file name, if the line has it.
        question: What was asked, if the line has it.
    """

    image_id: int
    caption: str
    truth: frozenset[str]
    reading: CaptionWords
    mentions: tuple[Mention, ...]
    known_image: bool
    id: str = ""
    image: str = ""
    question: str = ""

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

    @property
    def metrics(self) -> dict[str, float | None]:
        """This caption's own metrics; None where undefined (the scorers store 0, or nothing).

        Without true objects PAI's scorer stores neither precision nor F1, and so do we.
        """
        counts = self.counts()
        found, named, true = (counts[f"{kind}_objects"] for kind in ("found", "named", "true"))
        return {
            "chair_s": float(counts["hallucinated_captions"]),
            "chair_i": _quotient(counts["hallucinated_mentions"], counts["mentions"]),
            "recall": _quotient(found, true),
            "precision": _quotient(found, named) if true else None,
            "f1": _quotient(2 * found, named + true) if found else None,
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

    def places(self) -> list[tuple[int, int, str]]:
        """The named objects in the caption as it was given: start, end, COCO name."""
        places = _places_of_lower(self.caption)
        return [
            (places[start], places[end - 1] + 1, mention.node)
            for start, end, mention in self.spans()
            if start < end
        ]

    def marks(self) -> tuple[Mark, ...]:
        """The named objects in the caption as it was given: invented ones and true ones."""
        return tuple(
            Mark(start, end, "good", f"{node}: in the picture")
            if node in self.truth
            else Mark(start, end, "bad", f"{node}: invented")
            for start, end, node in self.places()
        )

    def sample(self) -> Sample:
        """The caption for people who want to see what the numbers consist of."""
        named = set(self.objects)
        invented = len(named - self.truth)
        note = (
            f"{len(named & self.truth)} found, {invented} invented, "
            f"{len(self.truth - named)} not named"
        )
        return Sample(
            id=self.id or str(self.image_id),
            image=self.image or str(self.image_id),
            question=self.question,
            answer=self.caption,
            correct=not invented,
            note=note,
            marks=self.marks(),
        )


def _quotient(numerator: int, denominator: int) -> float | None:
    return numerator / denominator if denominator else None


def _places_of_lower(text: str) -> list[int]:
    """For each character of ``text.lower()`` its place in the text; some letters become two."""
    return [place for place, letter in enumerate(text) for _ in letter.lower()]
