"""Stage V: the vision tower learns to see, with two heads that are thrown away afterwards."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from training.scratch.attention import DENSE
from training.scratch.loop import Stage
from training.scratch.source import Source

if TYPE_CHECKING:
    from transformers import CLIPVisionModel

__all__ = ["VisionStage", "normalise", "patch_head", "patch_labels", "patch_loss"]

LEAST_COVERED = 10 / 64
"""Fraction of a patch that a class must cover to be its label."""
BACKGROUND_WEIGHT = 0.25
"""Weight of background patches in the cross-entropy."""


def normalise(pictures: NDArray[np.uint8], mean: float, std: float) -> Tensor:
    """Pixels [B, S, S, 3] of 0 to 255 as the tower wants them: [B, 3, S, S], (x - mean) / std."""
    pixels = torch.from_numpy(pictures).permute(0, 3, 1, 2).contiguous()
    return (pixels.float() - mean) / std


def patch_labels(
    class_maps: NDArray[np.uint8], patch: int, n_classes: int, least: float = LEAST_COVERED
) -> Tensor:
    """The class that covers most of each patch, 0 (background) if none covers enough.

    Args:
        class_maps: [B, S, S], 0 background, 1 + class otherwise.
        patch: side of a patch in pixels.
        n_classes: number of classes.
        least: fraction of the patch that a class must cover to count.

    Returns:
        [B, (S / patch)^2] in row order, values 0 to n_classes.
    """
    images, size, _ = class_maps.shape
    side = size // patch
    cells = class_maps.reshape(images, side, patch, side, patch).transpose(0, 1, 3, 2, 4)
    cells = cells.reshape(images * side * side, patch * patch).astype(np.int64)
    bins = n_classes + 1
    flat = cells + bins * np.arange(len(cells))[:, None]
    counts = np.bincount(flat.ravel(), minlength=bins * len(cells)).reshape(len(cells), bins)
    best = counts[:, 1:].argmax(1)
    covered = counts[:, 1:].max(1) >= max(1, round(least * patch**2))
    return torch.from_numpy(np.where(covered, best + 1, 0).reshape(images, side * side))


def patch_head(width: int, n_classes: int) -> nn.Sequential:
    """A head that names the class in a patch from the tower's state there."""
    return nn.Sequential(nn.LayerNorm(width), nn.Linear(width, n_classes + 1))


def patch_loss(head: nn.Module, states: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy of the patches, and the accuracy on those that show an object.

    Args:
        head: see `patch_head`.
        states: [B, P, D], the tower's states without the class token.
        labels: [B, P], see `patch_labels`.
    """
    scores = head(states).float()
    weight = torch.ones(scores.shape[-1], device=scores.device)
    weight[0] = BACKGROUND_WEIGHT
    loss = nn.functional.cross_entropy(scores.flatten(0, 1), labels.flatten(), weight=weight)
    accuracy = (scores.argmax(-1) == labels)[labels > 0].float().mean()
    return loss, accuracy


class VisionStage(Stage):
    """Per-patch classification plus multi-label classification on the class token.

    Args:
        tower: trained in place.
        source: of pictures and class maps.
        batch_size: pictures a step.
        pixel_mean: see `normalise`.
        pixel_std: see `normalise`.
        presence_weight: factor on the class token's binary cross-entropy.
    """

    name: ClassVar[str] = "vision"

    def __init__(
        self,
        tower: CLIPVisionModel,
        source: Source,
        batch_size: int,
        *,
        pixel_mean: float,
        pixel_std: float,
        presence_weight: float = 5.0,
    ) -> None:
        super().__init__()
        width, classes = tower.config.hidden_size, source.n_classes
        self.tower = tower
        self.patch_head = patch_head(width, classes)
        self.presence_head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, classes))
        self.presence_weight = presence_weight
        self._source, self._batch_size = source, batch_size
        self._pixels = (pixel_mean, pixel_std)
        # The last norm follows the state that LLaVA reads, so nothing here trains it.
        tower.post_layernorm.requires_grad_(False)
        tower.set_attn_implementation(DENSE)

    def batch(self, step: int, rank: int, world_size: int) -> dict[str, Any]:
        """Pictures, patch labels and presence of each class."""
        first = step * self._batch_size
        share = range(first + rank, first + self._batch_size, world_size)
        drawn = [self._source.picture(index) for index in share]
        pictures, maps, present = zip(*drawn, strict=True)
        labels = patch_labels(np.stack(maps), self.tower.config.patch_size, self._source.n_classes)
        presence = torch.zeros(len(drawn), self._source.n_classes)
        for row, classes in enumerate(present):
            presence[row, classes] = 1.0
        return {
            "pixels": normalise(np.stack(pictures), *self._pixels),
            "labels": labels,
            "presence": presence,
        }

    def forward(self, pixels: Tensor, labels: Tensor, presence: Tensor) -> dict[str, Tensor]:
        """Both losses, and the accuracy on patches that show an object."""
        states = self.tower(pixels).last_hidden_state
        patch, accuracy = patch_loss(self.patch_head, states[:, 1:], labels)
        presence_loss = nn.functional.binary_cross_entropy_with_logits(
            self.presence_head(states[:, 0]).float(), presence
        )
        return {
            "loss": patch + self.presence_weight * presence_loss,
            "patch_loss": patch,
            "presence_loss": presence_loss,
            "patch_accuracy": accuracy,
        }
