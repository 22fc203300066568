"""Every number and rule of SENTINEL in one place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

__all__ = ["Coherence", "FinishRule", "NextRule", "Pairing", "SentinelSettings"]

Coherence: TypeAlias = Literal["any", "all"]
FinishRule: TypeAlias = Literal["ended", "authors"]
NextRule: TypeAlias = Literal["clean", "authors"]
Pairing: TypeAlias = Literal["order", "matched", "same_form"]


@dataclass(frozen=True)
class SentinelSettings:
    """How sentences are sampled, labelled and paired (arXiv 2507.12455).

    Attributes:
        n: Samples per step; at least 2. 10 in the authors' code.
        temperature: Sampling temperature; > 0. 0.7 (paper).
        max_sentences: Sentences per caption at most; at least 1. Our bound: the authors have none.
        cross_check: How detectors decide: `both` (all that vote must agree; paper), `vote` (the
            majority) or `single:NAME` (one of them).
        out_of_vocabulary: What a detector does about a name that it cannot know: `accept` (as the
            authors), `abstain`, or `auto`: abstain if any detector knows every name, else accept.
        coherence: A clean sentence is coherent if `any` (paper) or `all` (first release of the
            code) of its objects are in the context.
        allow_empty_context_pairs: Pairs for the first sentence too. With the paper's rule there
            are none, because nothing is coherent with an empty context.
        allow_agnostic_pairs: Let clean sentences about something new win as well (paper's ablation
            of y_w-).
        pairing: Which clean sentence meets which hallucinated one: ``order``, the first the first
            (paper); ``matched``, only sentences that name as many new objects, those of one form
            first; ``same_form``, those of one form alone. With ``order`` a small model learns to
            name less (docs/loop.md).
        allow_objectless_context: A sentence without objects may extend the context if there is no
            clean one; it cannot hallucinate an object.
        finish_rule: `ended`: a caption is complete when more than half of the samples are empty;
            `authors`: repeated samples count like empty ones.
        next_sentence: If no candidate is clean: `clean` takes one without an absent object or ends
            the picture; `authors` takes any.
        drop_pronouns: Leave out of pairs what is said about an unnamed "it" or "they"; there is no
            coreference model that would name them.
        keep_suspicious: Keep the pairs of pictures in which no detector found anything named.
        seed: Decides all samples and choices, together with the id of the picture.
    """

    n: int = 10
    temperature: float = 0.7
    max_sentences: int = 16
    cross_check: str = "both"
    out_of_vocabulary: Literal["auto", "abstain", "accept"] = "auto"
    coherence: Literal["any", "all"] = "any"
    allow_empty_context_pairs: bool = False
    allow_agnostic_pairs: bool = False
    pairing: Pairing = "order"
    allow_objectless_context: bool = True
    finish_rule: Literal["ended", "authors"] = "ended"
    next_sentence: Literal["clean", "authors"] = "clean"
    drop_pronouns: bool = True
    keep_suspicious: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        """Checks the values.

        Raises:
            ValueError: Names the field and what is allowed.
        """
        if self.n < 2:
            raise ValueError(f"n must be at least 2, got {self.n}")
        if not 0 < self.temperature < float("inf"):
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.max_sentences < 1:
            raise ValueError(f"max_sentences must be at least 1, got {self.max_sentences}")
        if self.cross_check not in ("both", "vote") and not _names_one(self.cross_check):
            raise ValueError(
                f"cross_check must be 'both', 'vote' or 'single:NAME', got {self.cross_check!r}"
            )
        for field, allowed in (
            ("out_of_vocabulary", ("auto", "abstain", "accept")),
            ("coherence", get_args(Coherence)),
            ("finish_rule", get_args(FinishRule)),
            ("next_sentence", get_args(NextRule)),
            ("pairing", get_args(Pairing)),
        ):
            if getattr(self, field) not in allowed:
                raise ValueError(
                    f"{field} must be one of {', '.join(allowed)}, got {getattr(self, field)!r}"
                )

    @classmethod
    def authors(cls, **changes: bool | float | str) -> SentinelSettings:
        """The authors' code (first release d41f3c4 to 0260bc9) instead of our corrections.

        Ten equal samples end a caption, any sentence may extend it when none is clean, a name
        outside a detector's vocabulary counts as found, a picture in which nothing was found is
        kept, and captions have no bound but 100 sentences. Two things lie in other parts: matching
        by substring in the detector, and reading every word as a noun in the extractor.

        Args:
            **changes: Fields with other values.
        """
        values: dict[str, bool | float | str] = {
            "max_sentences": 100,
            "out_of_vocabulary": "accept",
            "finish_rule": "authors",
            "next_sentence": "authors",
            "drop_pronouns": False,
            "keep_suspicious": True,
        }
        return cls(**{**values, **changes})  # type: ignore[arg-type]


def _names_one(policy: str) -> bool:
    """Whether a policy is ``single:NAME``; which names there are, only the pipeline knows."""
    return policy.startswith("single:") and policy != "single:"
