"""POVID, stage 2: what the model would rather say about a noised picture is the worse answer.

Paper: "Aligning Modalities in Vision Large Language Models via Preference Fine-tuning", Zhou et
al., 2024, arXiv 2402.11411.
Sources read: the authors' repository YiyangZhou/POVID; no code is copied.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from mmlm.engine.vision.pixels import NOISE_STEPS, signal_kept
from training.losses import ExtraLoss, Passes
from training.losses.pixels import change_pictures
from training.losses.shared import chosen_rows, compare, random_stream, sum_ratio

__all__ = ["POVID", "noised"]


def noised(picture: Tensor, generator: torch.Generator, step: int) -> Tensor:
    """``sqrt(abar_t) v + sqrt(1 - abar_t) eps``, eps standard normal.

    Args:
        picture: [C, H, W], normalised.
        generator: Of eps.
        step: t, see `mmlm.engine.vision.pixels.signal_kept`.
    """
    kept = signal_kept(step)
    eps = torch.randn(picture.shape, generator=generator).to(picture)
    return math.sqrt(kept) * picture + math.sqrt(1 - kept) * eps


@dataclass(frozen=True, kw_only=True)
class POVID(ExtraLoss):
    """Adds DPO of the chosen answer against the model's own under a noised picture.

    Idea:
        Under noise the model falls back on what it expects. Its likeliest token at every position
        of the chosen answer, read along the chosen answer, makes up a second rejected answer.
    Equations:
        ``y2_t = argmax p(. | noised v, x, y_w,<t)`` and
        ``l_2 = sum_t log pi(y2_t | v, x, y_w,<t) - log pi_ref(y2_t | v, x, y_w,<t)``: chosen under
        noise, scored under the clean picture; then ``-log sigma(beta (l_w - l_2))``.
    Cost:
        A pass of the policy without gradient for y2, and one of policy and reference to score it,
        each over the chosen answers; the first holds the logits of all positions, [B, S, V].
    Parameters:
        weight: Factor on the term, > 0. Default 0.5 (authors), which goes with a main loss of
            weight 0.5: ``types: [sigmoid]``, ``weights: [0.5]``.
        noise_step: Diffusion step t, 0 to 999. Default 500 (authors).
    Differs:
        The reference scores the policy's y2. In the authors' code it scores an y2 of its own, so
        that the ratio compares different tokens once the two have come apart.
        The noise is drawn anew in every step, for each picture.
    Limits:
        A row without a picture gets y2 from its text alone.

    The authors train with learning rate 1e-7, LoRA 128 / 256, after a stage of plain DPO.

    Raises:
        ValueError: For a parameter out of range.
        UnsupportedModel: At the first step, see `training.losses.pixels`.
    """

    weight: float = 0.5
    noise_step: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_integer("noise_step", at_least=0, at_most=NOISE_STEPS - 1)

    def __call__(self, passes: Passes) -> tuple[Tensor, dict[str, float]]:
        """The mean over chosen answers; logs ``povid/...``; `changed` is the share y2_t != y_t."""
        clean = chosen_rows(passes.inputs)
        mask = passes.mask[: len(passes.mask) // 2]
        likeliest = self._likeliest(passes, clean)
        labels = torch.full_like(clean["input_ids"], -100)
        labels[:, 1:] = torch.where(mask > 0, likeliest, -100)
        chosen, _ = passes.ratios()
        other = sum_ratio(*passes.again({**clean, "labels": labels}), mask)
        margin = passes.beta * (chosen - other).detach()
        changed = ((likeliest != clean["input_ids"][:, 1:]) & (mask > 0)).sum()
        log = {
            "povid/accuracies": (margin > 0).float().mean().item(),
            "povid/margins": margin.mean().item(),
            "povid/changed": (changed / mask.sum().clamp(min=1)).item(),
        }
        return compare(chosen, other, passes.beta), log

    def _likeliest(self, passes: Passes, clean: dict[str, Tensor]) -> Tensor:
        """[B, S - 1] y2, along the chosen answers."""
        stream = random_stream(passes, "POVID")
        noisy = change_pictures(
            clean, passes.config, lambda picture: noised(picture, stream, self.noise_step)
        )
        return passes.logits(noisy)[:, :-1].argmax(-1)
