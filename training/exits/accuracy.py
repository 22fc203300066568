"""How often routers are right, per layer, and separately where they should keep and exit."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["Accuracy"]


class Accuracy:
    """Counts of right decisions by layer and label.

    One number over both labels would hide a router that always says the same.

    Args:
        layers: the layers that have a router.
    """

    def __init__(self, layers: tuple[int, ...]) -> None:
        self._layers = layers
        self._counts = torch.zeros(len(layers), 2, 2, dtype=torch.float64)  # [, label, total/right]

    def add(self, layer: int, logits: Tensor, labels: Tensor, threshold: float = 0.0) -> None:
        """Counts one batch.

        Args:
            layer: whose router was asked.
            logits: its answers [B, 2].
            labels: 1 for exit [B].
            threshold: margin above which it exits.
        """
        fires = (logits[:, 1] - logits[:, 0] > threshold).long()
        row = self._counts[self._layers.index(layer)]
        for label in (0, 1):
            own = labels == label
            row[label, 0] += int(own.sum())
            row[label, 1] += int((fires[own] == label).sum())

    def take(self, device: torch.device) -> dict[str, float]:
        """The figures of all processes since the last call; all of them must call it.

        Args:
            device: of this process, on which processes exchange tensors.

        Returns:
            ``exit_share``: share of labels that say exit; ``keep_accuracy`` and ``exit_accuracy``:
            over all layers; ``layer_03/keep`` and so on: of one. What never occurred is left out.
        """
        counts, self._counts = self._counts, torch.zeros_like(self._counts)
        if torch.distributed.is_initialized():
            shared = counts.float().to(device)
            torch.distributed.all_reduce(shared)
            counts = shared.double().cpu()
        total = counts.sum(0)
        if not total[:, 0].sum():
            return {}
        found = {"exit_share": float(total[1, 0] / total[:, 0].sum())}
        named = [("", total)]
        named += [(f"layer_{x:02}/", c) for x, c in zip(self._layers, counts, strict=True)]
        for name, count in named:
            for label, what in enumerate(("keep", "exit")):
                if count[label, 0]:
                    end = "_accuracy" if not name else ""
                    found[f"{name}{what}{end}"] = float(count[label, 1] / count[label, 0])
        return found
