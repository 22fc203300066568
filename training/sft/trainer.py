"""The Trainer of transformers with the loss, the order and the rates of supervised fine-tuning."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import Trainer
from transformers.loss.loss_utils import ForCausalLMLoss

from mmlm.engine.method import MODULES
from training.sft.buckets import LengthBuckets

if TYPE_CHECKING:
    from torch.utils.data import Dataset, Sampler

    from training.sft.data import Examples

__all__ = ["SFTTrainer", "token_mean"]


def token_mean(
    outputs: Any, labels: Tensor, num_items_in_batch: Tensor | int | None = None
) -> Tensor:
    """Cross-entropy of the learned tokens, every token of an optimiser step counting alike.

    loss = - 1/N sum over learned t of log p(x_t | x_<t, pictures), N the learned tokens of the
    whole step, over all passes and processes. (Some families would average each pass by itself,
    which gives the tokens of short answers more weight.)

    Args:
        outputs: Of the model, with ``logits`` [B, L, V].
        labels: Ids of the learned tokens, -100 elsewhere [B, L].
        num_items_in_batch: N; None for the learned tokens of this pass.
    """
    return ForCausalLMLoss(
        outputs["logits"], labels, outputs["logits"].shape[-1], num_items_in_batch
    )


class SFTTrainer(Trainer):
    """Supervised fine-tuning of a vision-language model.

    Args:
        train_dataset: The examples; their lengths are needed for length bucketing
            (``train_sampling_strategy="group_by_length"``).
        projector: Parameters with a learning rate of their own.
        projector_learning_rate: That rate; None leaves them with the others.
        more: Of transformers' Trainer.
    """

    def __init__(
        self,
        *,
        train_dataset: Examples,
        projector: tuple[nn.Parameter, ...] = (),
        projector_learning_rate: float | None = None,
        **more: Any,
    ) -> None:
        super().__init__(train_dataset=train_dataset, compute_loss_func=token_mean, **more)
        self._projector = {id(parameter) for parameter in projector}
        self._projector_rate = projector_learning_rate

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        """Length buckets; the library's own order depends on the global random state."""
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        arguments = self.args
        return LengthBuckets(  # type: ignore[return-value]
            self.train_dataset.lengths,
            arguments.train_batch_size
            * arguments.gradient_accumulation_steps
            * arguments.world_size,
            arguments.seed,
        )

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """The library's choice, without the gates of built-in methods: 0 would close them."""
        names: list[str] = super().get_decay_parameter_names(model)
        return [n for n in names if not (MODULES in n and n.endswith(".gate"))]

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """The library's, with the projector's parameters in groups of their own."""
        made = self.optimizer is None
        optimizer = super().create_optimizer(model)
        if made and self._projector_rate is not None:
            for group in list(optimizer.param_groups):
                own = [p for p in group["params"] if id(p) in self._projector]
                if own:
                    group["params"] = [p for p in group["params"] if id(p) not in self._projector]
                    rest = {k: v for k, v in group.items() if k not in ("params", "lr")}
                    optimizer.add_param_group({**rest, "params": own, "lr": self._projector_rate})
        return optimizer
