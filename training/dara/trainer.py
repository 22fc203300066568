"""The trainer of DARA: the model is used as it will be used, and nothing else learns."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from training.sft.trainer import SFTTrainer

__all__ = ["CalmTrainer", "calm"]


def calm(model: nn.Module) -> None:
    """Puts a model into evaluation mode, but for layers that recompute their activations.

    Those decide by their mode whether to do so; dropout and the like sit in their parts.
    """
    for module in model.modules():
        module.training = bool(getattr(module, "gradient_checkpointing", False))


class CalmTrainer(SFTTrainer):
    """Supervised fine-tuning without dropout.

    Factors of the first layer are trained through all of the frozen network, whose noise would be
    all that changes from step to step.
    """

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], *args: Any, **more: Any
    ) -> Any:
        """The loss; the Trainer has just put the model into training mode."""
        calm(self.accelerator.unwrap_model(model))
        loss: Tensor | tuple[Tensor, Any] = super().compute_loss(model, inputs, *args, **more)
        return loss
