"""How often attention heads look exactly at what is about to be written. Pure functions.

Papers: "Retrieval Head Mechanistically Explains Long-Context Factuality", Wu et al., arXiv
2404.15574, code nightdessert/Retrieval_Head @3ac171a; "SparseMM: Head Sparsity Emerges from Visual
Concept Responses in MLLMs", Wang et al., arXiv 2506.05344, code CR400AF-A/SparseMM @f52655b.
Neither code has a licence file; nothing is copied.

Everything starts from the *peak* of a row, the key with the most attention: int64 [S, N_l, H] for
the S rows that produced the tokens of an answer.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, fields

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["Region", "RegionCounts", "find_needle", "retrieval_hits", "retrieval_scores"]

#: Attention on the image below which a row does not say how it is spread over it.
_LEAST_MASS = 1e-6


def find_needle(prompt_ids: Sequence[int], needle_ids: Sequence[int]) -> tuple[int, int]:
    """Where the exact ids of a needle stand first: the first position and the one behind the last.

    The authors take the first window that shares nine tenths of the ids, which is early by one to
    three positions for long needles.

    Raises:
        ValueError: If the prompt does not have the needle, token by token.
    """
    prompt, needle = list(prompt_ids), list(needle_ids)
    for start in range(len(prompt) - len(needle) + 1) if needle else ():
        if prompt[start : start + len(needle)] == needle:
            return start, start + len(needle)
    raise ValueError(
        f"The {len(needle)} tokens of the needle do not stand in the {len(prompt)} of the prompt."
    )


def retrieval_hits(
    peaks: Int[Tensor, "S N_l H"],
    prompt_ids: Int[Tensor, "T"],
    span: tuple[int, int],
    produced: Int[Tensor, "S"],
) -> Bool[Tensor, "S N_l H"]:
    """Whether a head looks into the needle, at the very token that is then written."""
    inside = (peaks >= span[0]) & (peaks < span[1])
    there = prompt_ids[peaks.clamp(max=len(prompt_ids) - 1)]
    return inside & (there == produced[:, None, None])


def retrieval_scores(
    peaks: Int[Tensor, "S N_l H"],
    prompt_ids: Int[Tensor, "T"],
    span: tuple[int, int],
    produced: Int[Tensor, "S"],
) -> tuple[Float[Tensor, "N_l H"], Float[Tensor, "N_l H"]]:
    """The part of a needle that each head copies.

    Returns:
        The authors' score, which counts every repetition and so may exceed 1, and the share of the
        needle's positions that were hit at all.
    """
    hits = retrieval_hits(peaks, prompt_ids, span, produced)
    length = span[1] - span[0]
    every = hits.double().sum(0) / length
    at = torch.arange(span[0], span[1], device=peaks.device)
    once = (hits[..., None] & (peaks[..., None] == at)).any(0)
    return every, once.double().sum(-1) / length


@dataclass(frozen=True)
class Region:
    """What the rows that produced one word saw; image tokens are counted from 0.

    Attributes:
        size: Image tokens of the region, >= 1.
        image: Image tokens in all, V.
        hit: Bool [N_l, H]; whether the peak lies in the region.
        looks: Bool [N_l, H]; whether it lies on any image token.
        mass: [N_l, H]; attention on the region.
        image_mass: [N_l, H]; attention on all image tokens.
    """

    size: int
    image: int
    hit: Bool[Tensor, "N_l H"]
    looks: Bool[Tensor, "N_l H"]
    mass: Float[Tensor, "N_l H"]
    image_mass: Float[Tensor, "N_l H"]


@dataclass
class RegionCounts:
    """Sums over scored steps: words that name something whose place in the picture is known.

    Counts of several pictures add up (:meth:`add`). All sums are fp64 [N_l, H].

    Attributes:
        steps: Scored steps S.
        chance: Sum of ``|R| / V``.
        hits: Sum of ``[peak in R]``.
        looks: Sum of ``[peak in V]``.
        mass: Sum of the attention on R.
        authors: Sum of ``[peak in R] / |R|``, SparseMM's score.
        focus: Sum of the attention on R as a part of that on V, over ``|R| / V``.
        focused: Steps in ``focus``: with any attention on the image.
    """

    steps: int = 0
    chance: float = 0.0
    hits: Tensor = field(default_factory=lambda: torch.zeros(()))
    looks: Tensor = field(default_factory=lambda: torch.zeros(()))
    mass: Tensor = field(default_factory=lambda: torch.zeros(()))
    authors: Tensor = field(default_factory=lambda: torch.zeros(()))
    focus: Tensor = field(default_factory=lambda: torch.zeros(()))
    focused: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def of(cls, regions: Iterable[Region]) -> RegionCounts:
        """The sums over the steps of one picture, or of several."""
        counts = cls()
        for one in regions:
            share = one.size / one.image
            seen = one.image_mass > _LEAST_MASS
            part = torch.where(seen, one.mass / one.image_mass.clamp(min=_LEAST_MASS), 0.0)
            counts = counts.add(
                cls(
                    steps=1,
                    chance=share,
                    hits=one.hit.double(),
                    looks=one.looks.double(),
                    mass=one.mass.double(),
                    authors=one.hit.double() / one.size,
                    focus=part.double() / share,
                    focused=seen.double(),
                )
            )
        return counts

    def add(self, other: RegionCounts) -> RegionCounts:
        """The sums over the steps of both."""
        return RegionCounts(
            **{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(self)}
        )

    def values(self) -> dict[str, Float[Tensor, "N_l H"]]:
        """Means over the steps.

        Returns:
            ``hit_rate``; ``hit_excess``, above a head that looks at a random image token; ``mass``;
            ``focus``, 1 for attention spread evenly over the image, over the steps that had any
            (NaN where none had);
            ``looks``; ``authors``, the sum of the original score.

        Raises:
            ValueError: If there is no scored step.
        """
        if not self.steps:
            raise ValueError("No word of any answer names something whose place is known.")
        n = self.steps
        return {
            "hit_rate": self.hits / n,
            "hit_excess": (self.hits - self.chance) / n,
            "mass": self.mass / n,
            "focus": self.focus / self.focused,  # 0 / 0 is no number
            "looks": self.looks / n,
            "authors": self.authors,
        }
