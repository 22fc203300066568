"""The Trainer of transformers with the loss of routers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from mmlm.engine.anatomy import Anatomy, unwrap
from mmlm.engine.method import MODULES
from mmlm.methods.dyvte import DyVTE
from mmlm.methods.routers import Routers
from training.exits.accuracy import Accuracy
from training.exits.labels import ExitRule, LabelFile, Measured
from training.exits.passes import Outcome, SharedPass, last_answers
from training.sft.trainer import SFTTrainer

__all__ = ["ExitTrainer", "drawn_layers", "router_loss"]


def drawn_layers(layers: tuple[int, ...], count: int, seed: int, step: int) -> tuple[int, ...]:
    """The exits of one step: different ones, for all of its passes and processes alike.

    Args:
        layers: to draw from.
        count: how many.
        seed: of the run.
        step: optimiser step.
    """
    draw = np.random.default_rng([seed, step])
    return tuple(sorted(int(x) for x in draw.choice(layers, size=count, replace=False)))


def router_loss(logits: Tensor, labels: Tensor, weights: Tensor) -> Tensor:
    """Cross-entropy of a router's logits [B, 2] with labels [B], classes (keep, exit) weighted."""
    return functional.cross_entropy(logits.float(), labels, weight=weights.to(logits.device))


class ExitTrainer(SFTTrainer):
    """Trains the routers of a model with DyVTE built in.

    Args:
        method: the DyVTE that is built in.
        rule: what a harmless exit is.
        exits_per_step: how many exits are judged in each step.
        class_weights: of keep and exit in the loss.
        label_file: gets the exact values; None to keep none.
        known: exact values of an earlier run; exits with known values are not computed again.
        more: of `training.sft.trainer.SFTTrainer`. Batches hold ``ids``, the names of the rows.
    """

    def __init__(
        self,
        *,
        method: DyVTE,
        rule: ExitRule,
        exits_per_step: int,
        class_weights: tuple[float, float],
        label_file: LabelFile | None,
        known: Mapping[tuple[str, int], Measured],
        **more: Any,
    ) -> None:
        super().__init__(**more)
        # The loss is a mean over rows: accumulation divides it, as transformers does by itself.
        self.compute_loss_func, self.model_accepts_loss_kwargs = None, False
        self._anatomy = Anatomy(unwrap(self.model))
        self._layers = method.gates(self._anatomy.n_layers)
        self._threshold = method.threshold
        self._rule, self._count = rule, exits_per_step
        self._weights = torch.tensor(class_weights)
        self._file, self._known = label_file, known
        self._accuracy = {False: Accuracy(self._layers), True: Accuracy(self._layers)}

    @property
    def routers(self) -> Routers:
        """What learns."""
        found = getattr(self._anatomy.model, MODULES)["DyVTE"]
        assert isinstance(found, Routers)
        return found

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The mean loss of the routers of some layers: those drawn, or all in an evaluation."""
        training = model.training
        layers = self._layers
        if training:
            seed, step = int(self.args.seed), int(self.state.global_step)
            layers = drawn_layers(layers, self._count, seed, step)
        with self.accelerator.autocast():
            loss = self._loss(model, inputs, layers, training)
        return (loss, {}) if return_outputs else loss

    def _loss(
        self, model: Any, inputs: dict[str, Any], layers: tuple[int, ...], training: bool
    ) -> Tensor:
        given = {k: v for k, v in inputs.items() if k not in ("labels", "ids")}
        ids = inputs["ids"]
        visual = torch.isin(
            given["input_ids"], given["input_ids"].new_tensor(self._anatomy.image_ids)
        )
        real = given["attention_mask"].bool()
        answers = last_answers(inputs["labels"])
        shared = SharedPass(self._anatomy.model, visual & real, real, answers, layers)
        self._anatomy.model.eval()  # nothing is dropped at random: labels are exact
        try:
            # Not under no_grad: what DDP has wrapped around the model gets ready for gradients.
            with self.routers.hold():
                shared.run(model, {**given, "logits_to_keep": 1})
        finally:
            self._anatomy.model.train(training)
        losses = []
        for layer in layers:
            outcome = self._outcome(shared, layer, ids)
            labels = self._rule.label(outcome.agree, outcome.ce_with, outcome.ce_without)
            logits = self.routers.at(layer)(shared.features(layer))
            losses.append(router_loss(logits, labels, self._weights))
            self._accuracy[training].add(layer, logits.detach(), labels, self._threshold)
        loss = torch.stack(losses).mean()
        if training:
            # Every router gets a gradient in every pass, or processes would wait for one another.
            loss = loss + 0.0 * sum(p.sum() for p in self.routers.parameters())
        return loss

    def _outcome(self, shared: SharedPass, layer: int, ids: list[str]) -> Outcome:
        known = [self._known.get((i, layer)) for i in ids]
        if all(one is not None for one in known):
            columns = zip(*((o.agree, o.ce_with, o.ce_without) for o in known if o), strict=True)
            return Outcome(*(torch.tensor(c, device=self.args.device) for c in columns))
        outcome = shared.outcome(layer)
        if self._file is not None:
            self._file.add(ids, layer, outcome)
        return outcome

    def prediction_step(
        self,
        model: Any,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The loss over all routers; what they got right is counted on the way."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return self.compute_loss(model, inputs).detach(), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Adds how often the routers were right since the last time."""
        evaluated = any(name.startswith("eval_") for name in logs)
        found = {}
        if evaluated or "loss" in logs:
            found = self._accuracy[not evaluated].take(self.args.device)
        prefix = "eval_" if evaluated else ""
        super().log({**logs, **{prefix + name: x for name, x in found.items()}}, start_time)
