"""RLHF-V: DPO in which the corrected parts of an answer count more than the rest.

Paper: "RLHF-V: Towards Trustworthy MLLMs via Behavior Alignment from Fine-grained Correctional
Human Feedback", Yu et al., CVPR 2024, arXiv 2312.00849.
Sources read: the authors' repository RLHF-V/RLAIF-V, which holds the training code; no code is
copied.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float, Num
from torch import Tensor

from training.losses import ExtraLoss, Passes
from training.losses.shared import compare

__all__ = ["RLHFV", "changed_tokens", "token_weights"]


def changed_tokens(
    first: Sequence[int], second: Sequence[int], *, shortest: int = 3, one_sided: bool = False
) -> tuple[list[int], list[int]]:
    """Places at which two token sequences differ.

    Runs of equal tokens are found with `difflib`; runs shorter than `shortest` do not count as
    equal. What lies between two runs is changed if there is something on both sides.

    Args:
        first: Token ids.
        second: Token ids.
        shortest: Tokens of the shortest run, >= 1.
        one_sided: Whether what stands on one side only, an insertion, counts as changed too.

    Returns:
        Ascending positions in the first and in the second sequence.
    """
    # With its default difflib drops tokens that are frequent in texts of 200 tokens and more.
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    *runs, end = matcher.get_matching_blocks()
    places: tuple[list[int], list[int]] = ([], [])
    i = j = 0
    for run in [run for run in runs if run.size >= shortest] + [end]:
        both = run.a > i and run.b > j
        if both or one_sided:
            places[0].extend(range(i, run.a))
            places[1].extend(range(j, run.b))
        i, j = run.a + run.size, run.b + run.size
    return places


def token_weights(
    ids: Num[Tensor, "R S"],
    mask: Num[Tensor, "R T"],
    gamma: float,
    *,
    shortest: int = 3,
    one_sided: bool = False,
) -> Float[Tensor, "R T"]:
    """Weight gamma on changed tokens, 1 on the other scored ones, 0 on what is not scored.

    Args:
        ids: [2B, S] rows [chosen x B; rejected x B].
        mask: [2B, S - 1], 1 where token t + 1 is scored.
        gamma: Weight of changed tokens.
        shortest: See `changed_tokens`.
        one_sided: See `changed_tokens`.
    """
    weights = mask.to(torch.float32)
    half = len(ids) // 2
    columns = [row.nonzero()[:, 0] for row in mask]
    answers = [row[1:][at].tolist() for row, at in zip(ids, columns, strict=True)]
    for pair in range(half):
        rows = (pair, half + pair)
        changed = changed_tokens(
            *(answers[r] for r in rows), shortest=shortest, one_sided=one_sided
        )
        for row, places in zip(rows, changed, strict=True):
            weights[row, columns[row][places]] = gamma
    return weights


@dataclass(frozen=True, kw_only=True)
class RLHFV(ExtraLoss):
    """Dense DPO, in the place of the main loss.

    Idea:
        In pairs made by correcting an answer most tokens are equal on both sides. Those that were
        corrected say what was wrong, so they weigh gamma times as much.
    Equations:
        ``log p(y) = (sum_unchanged log p(y_t) + gamma sum_changed log p(y_t)) / N`` with
        ``N = |unchanged| + gamma |changed|`` for policy and reference alike, then
        ``-log sigma(beta (l_w - l_l))``.
    Cost:
        None: it reads the main pass. It needs the reference's tokens, so no reference cache.
    Parameters:
        weight: Factor on the loss, > 0. Default 1.
        gamma: Weight of changed tokens, > 0. Default 3 (authors' code). 1 is plain DPO.
        average: Whether to divide by N (the paper) or not (the authors' code and the default).
            An average makes rewards smaller by about the length of the answers.
        shortest: Tokens of the shortest run that counts as unchanged, >= 1. Default 3 (code).
        one_sided: Whether insertions and deletions weigh gamma too. Default no, as in the code: a
            segment counts as changed only if it has a counterpart.
    Differs:
        Long answers are matched like short ones (difflib's shortcut from 200 tokens on is off).

    Raises:
        ValueError: For a parameter out of range.
    """

    replaces_main: ClassVar[bool] = True
    needs_reference_tokens: ClassVar[bool] = True

    gamma: float = 3.0
    average: bool = False
    shortest: int = 3
    one_sided: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_number("gamma", above=0)
        self._check_integer("shortest", at_least=1)

    def __call__(self, passes: Passes) -> tuple[Tensor, dict[str, float]]:
        """The mean over pairs; logs ``rlhf_v/...``: accuracy, margin, share of changed tokens."""
        mask = passes.mask
        weights = token_weights(
            passes.inputs["input_ids"],
            mask,
            self.gamma,
            shortest=self.shortest,
            one_sided=self.one_sided,
        )
        ratios = torch.where(mask > 0, passes.policy - passes.reference, 0).mul(weights).sum(1)
        if self.average:
            ratios = ratios / weights.sum(1).clamp(min=1e-9)
        better, worse = ratios.chunk(2)
        margin = passes.beta * (better - worse).detach()
        heavy = ((weights != 1) & (mask > 0)).sum()
        log = {
            "rlhf_v/accuracies": (margin > 0).float().mean().item(),
            "rlhf_v/margins": margin.mean().item(),
            "rlhf_v/changed": (heavy / mask.sum().clamp(min=1)).item(),
        }
        return compare(better, worse, passes.beta), log
