"""Which heads push towards the image, and which towards what the model remembers: pure functions.

A conflict sample is a prompt whose picture says one thing (the image answer) and whose scene lets
the model expect another (the memory answer). :mod:`decoding.conflict_runs` measures how much every
head decides between the two; here samples are selected and heads are ranked.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from decoding.head_records import HeadLists
from mmlm.engine.head_maps import Head

__all__ = [
    "LEAST_SAMPLES",
    "LENS_HEADS",
    "Halves",
    "Means",
    "Measured",
    "Score",
    "balanced",
    "counted",
    "lens_shares",
    "list_heads",
    "means_of",
    "rank_correlation",
    "select",
    "torn",
]

#: By what memory heads are ranked: path patching I, unpatched direct attribution J, or I + J.
#: "lens" ranks both kinds as Ortu et al. do (arXiv 2507.13868): :func:`lens_shares`.
Score: TypeAlias = Literal["sum", "patching", "attribution", "lens"]

#: Numbers of the samples that count, in two halves of which each is balanced.
Halves: TypeAlias = tuple[Sequence[int], Sequence[int]]

#: Fewer samples than this say nothing.
LEAST_SAMPLES = 30

#: So many heads of either kind are listed by the lens (their code).
LENS_HEADS = 20


class Measured(NamedTuple):
    """What all samples gave, in their order."""

    memory: Int[Tensor, "n"]
    image: Int[Tensor, "n"]
    plain: Float[Tensor, "n"]
    """``z(image) - z(memory)``: above 0 the model answers by the image."""
    among_ten: Bool[Tensor, "n"]
    """Whether both answers are among the ten most likely next tokens."""
    pushes: Float[Tensor, "n N_l H"]
    """I: patched with the image-corrupted run."""
    says: Float[Tensor, "n N_l H"]
    """J: unpatched direct attribution."""
    remembers: Float[Tensor, "n N_l H"]
    """I of the prior-corrupted run, where there is one, else of the image-corrupted."""
    kinds: tuple[str, ...]
    yes_no: tuple[bool, ...]


def torn(measured: Measured) -> Bool[Tensor, "n"]:
    """Samples between whose answers the model hesitates.

    Both answers are among the ten most likely tokens; for yes/no questions, where they always are,
    the two logits are nearer to each other than in the median question.
    """
    yes_no = torch.tensor(measured.yes_no, dtype=torch.bool)
    distinct = measured.memory != measured.image
    gap = measured.plain.abs()
    asked = gap[yes_no & distinct]
    near = gap < asked.median() if len(asked) else torch.zeros_like(distinct)
    return distinct & torch.where(yes_no, near, measured.among_ten)


def balanced(measured: Measured, chosen: Bool[Tensor, "n"]) -> Halves:
    """As many samples of every kind with the plain answer by the image as by memory.

    Among yes/no questions the two are also balanced over what yes stands for: otherwise the heads
    found are those that say yes.

    Returns:
        Numbers of samples, in two halves of which each is balanced.
    """
    cells: dict[tuple[str, int, bool], list[int]] = {}
    for i in chosen.nonzero().flatten().tolist():
        answers = (int(measured.image[i]), int(measured.memory[i])) if measured.yes_no[i] else (0,)
        for answer in answers:  # every cell of the kind, also one that stays empty
            for by_image in (True, False):
                cells.setdefault((measured.kinds[i], answer, by_image), [])
        cells[measured.kinds[i], answers[0], bool(measured.plain[i] > 0)].append(i)
    halves: tuple[list[int], list[int]] = ([], [])
    for kind in dict.fromkeys(measured.kinds):
        own = [found for (of, *_), found in sorted(cells.items()) if of == kind]
        count = min((len(found) for found in own), default=0) // 2
        for half, kept in enumerate(halves):
            kept.extend(found[2 * nth + half] for nth in range(count) for found in own)
    return halves


def select(measured: Measured) -> Halves:
    """The samples that count, in two balanced halves.

    Raises:
        ValueError: If there are too few, with what became of the others.
    """
    halves = balanced(measured, torn(measured))
    counts = counted(measured, halves)
    if not counts["distinct"]:
        raise ValueError(
            f"In all {counts['samples']} samples both answers begin with the same token."
        )
    if counts["kept"] < LEAST_SAMPLES:
        raise ValueError(
            f"Only {counts['kept']} samples are left of {counts['samples']}: "
            f"{counts['samples'] - counts['distinct']} whose answers begin with the same token, "
            f"{counts['distinct'] - counts['torn']} over which the model does not hesitate, "
            f"{counts['torn'] - counts['kept']} more than their counterparts. At least "
            f"{LEAST_SAMPLES} are needed: give more samples."
        )
    return halves


def counted(measured: Measured, halves: Halves) -> dict[str, int]:
    """How many samples there were, and how many were left after each filter."""
    return {
        "samples": len(measured.kinds),
        "distinct": int((measured.memory != measured.image).sum()),
        "torn": int(torn(measured).sum()),
        "kept": len(halves[0]) + len(halves[1]),
    }


class Means(NamedTuple):
    """Mean of every head over the samples, and its standard error."""

    mean: Float[Tensor, "N_l H"]
    error: Float[Tensor, "N_l H"]


def means_of(x: Float[Tensor, "n N_l H"]) -> Means:
    """Mean and standard error over samples."""
    return Means(x.mean(0), x.std(0) / len(x) ** 0.5)


def lens_shares(says: Float[Tensor, "n N_l H"]) -> Float[Tensor, "N_l H"]:
    """How often a head alone says the image answer rather than the memory answer, less one half.

    The logit lens of a head is what the last norm and the unembedding make of its output; of two
    answers it prefers the one for which J is, whatever the norm's scale. A head that says nothing
    prefers neither.
    """
    return 0.5 * says.sign().double().mean(0)


def _ranked(x: Means, significance: float, sign: int) -> list[Head]:
    """Heads whose mean has this sign and is clear of its error, the strongest first."""
    clear = (sign * x.mean > 0) & (x.mean.abs() > significance * x.error)
    heads = [(layer, head) for layer, head in clear.nonzero().tolist()]
    return sorted(heads, key=lambda at: (-abs(float(x.mean[at])), at))


def rank_correlation(a: Float[Tensor, "..."], b: Float[Tensor, "..."]) -> float:
    """Spearman's correlation over all numbers; ties get the mean of their ranks."""
    ranks = []
    for x in (a.flatten(), b.flatten()):
        _, which, counts = x.unique(return_inverse=True, return_counts=True)
        last = counts.cumsum(0).double()
        ranks.append((last - (counts - 1) / 2)[which])
    both = torch.stack(ranks)
    if bool((both.std(dim=-1) == 0).any()):
        return 0.0
    return float(torch.corrcoef(both)[0, 1])


def list_heads(
    measured: Measured,
    halves: Halves,
    *,
    significance: float = 2.0,
    score: Score = "patching",
    protect: Sequence[Head] = (),
    protect_layers: int = 2,
) -> HeadLists:
    """Both lists, from the samples that were kept.

    Args:
        measured: What the samples gave.
        halves: Numbers of the samples.
        significance: Standard errors by which a head's mean must be clear of 0.
        score: By what memory heads are ranked. "lens": both kinds by :func:`lens_shares`, the 20
            strongest of each, whatever their error.
        protect: Heads that are never listed.
        protect_layers: First layers of which none is.
    """

    def means(rows: Sequence[int]) -> tuple[Means, Means]:
        index = torch.tensor(list(rows))
        if score == "lens":
            shares = lens_shares(measured.says[index])
            return (Means(shares, torch.zeros_like(shares)),) * 2
        by = {"patching": measured.remembers, "attribution": measured.says}
        memory = by.get(score, measured.remembers + measured.says)
        return means_of(measured.pushes[index]), means_of(memory[index])

    def lists(of: tuple[Means, Means]) -> tuple[list[Head], list[Head]]:
        most = LENS_HEADS if score == "lens" else None
        return _ranked(of[0], significance, 1)[:most], _ranked(of[1], significance, -1)[:most]

    first, second = means(halves[0]), means(halves[1])
    image, memory = lists(means([*halves[0], *halves[1]]))
    (image_1, memory_1), (image_2, memory_2) = lists(first), lists(second)
    changing = {*image_1} & {*memory_2} | {*image_2} & {*memory_1}
    listed = {*image, *memory}
    removed = {
        "in both lists": {*image} & {*memory},
        "in the other list in one half": listed & changing,
        "protected": {h for h in listed if h[0] < protect_layers or h in protect},
    }
    out = set().union(*removed.values())
    return HeadLists(
        tuple(h for h in image if h not in out),
        tuple(h for h in memory if h not in out),
        {reason: tuple(sorted(found)) for reason, found in removed.items()},
        {
            name: round(rank_correlation(first[i].mean, second[i].mean), 4)
            for i, name in enumerate(("image", "memory"))
        },
    )
