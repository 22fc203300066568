"""TRL's DPOTrainer for pictures and begun answers.

C-DPO needs no loss of its own: its context is part of the prompt, which the collator writes.
MIA-DPO is a mixture of TRL's losses. So this class adds only what TRL lacks: checks of silent
traps, our collator, rows from memory, the two fast paths, and further losses beside TRL's own.
TRL's `_compute_loss` stays what it is; what it computes on the way is watched by a hook.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import use_adapter

from mmlm.engine.anatomy import unwrap
from mmlm.errors import InputError
from training.fast import install_features_once, install_length_guard, install_shared_prefix
from training.lora import refuse_targets_outside
from training.losses import ExtraLoss, total_loss
from training.losses.settings import check_loss
from training.preference.cache_settings import refuse_trl_cache
from training.preference.collator import VisionPreferenceCollator
from training.preference.rows import PreferenceRow
from training.preference.table import row_table
from training.turns import refuse_other_masks, turns_of

__all__ = ["VLPreferenceTrainer"]

_NOT_OF_THE_MODEL = {"completion_mask", "labels", "ref_chosen_logps", "ref_rejected_logps"}
FastPath = Literal["features_once", "shared_prefix"]
# In this order: packing the rows then finds the pictures encoded.
_FAST = {"features_once": install_features_once, "shared_prefix": install_shared_prefix}


class VLPreferenceTrainer(DPOTrainer):
    """Preference training of a vision-language model.

    Args:
        model: the policy, a model with its head (TRL's `PeftModel` works too).
        ref_model: the reference of a full training; with adapters leave it out.
        args: TRL's `DPOConfig`. `max_length` other than None cuts answers in TRL's own collator;
            ours refuses instead.
        train_dataset: `PreferenceRow`s, or a `datasets.Dataset` in TRL's or our columns.
        eval_dataset: likewise, or None.
        processing_class: the model's processor.
        data_collator: None for `VisionPreferenceCollator(processing_class)`.
        peft_config: adapters; see `training.lora.lora_config`.
        extra_losses: terms beside TRL's loss, or in its place (`training.losses`).
        fast: "features_once" encodes each picture once instead of four times; "shared_prefix"
            reads prompt and picture once for both answers. The numbers stay those of plain.
        auxiliary: yields batches of other data for losses that need them (HA-DPO).
        more: further arguments of TRL's trainer.

    Raises:
        ValueError: a silent trap of TRL is set (padding_free, use_liger_kernel,
            precompute_ref_log_probs), a loss cannot be computed, or adapters would sit outside the
            language model.
    """

    def __init__(
        self,
        model: Any,
        ref_model: Any = None,
        args: DPOConfig | None = None,
        *,
        train_dataset: Sequence[PreferenceRow] | Dataset,
        eval_dataset: Sequence[PreferenceRow] | Dataset | None = None,
        processing_class: Any,
        data_collator: Any = None,
        peft_config: Any = None,
        extra_losses: Sequence[ExtraLoss] = (),
        fast: Sequence[FastPath] = (),
        auxiliary: Any = None,
        **more: Any,
    ) -> None:
        args = args or DPOConfig("preference", use_cpu=not torch.cuda.is_available())
        _refuse_silent_switches(args)
        check_loss(
            args.loss_type,
            args.loss_weights,
            args.beta,
            label_smoothing=args.label_smoothing,
            ld_alpha=args.ld_alpha,
            use_weighting=args.use_weighting,
            f_divergence_type=args.f_divergence_type,
            extra=extra_losses,
        )
        if any(loss.needs_auxiliary for loss in extra_losses) and auxiliary is None:
            raise ValueError("AuxiliarySFT needs other data: give `auxiliary`")
        if unknown := [name for name in fast if name not in _FAST]:
            raise ValueError(f"fast path {unknown[0]!r} is unknown; there are {', '.join(_FAST)}")
        if peft_config is not None:
            refuse_targets_outside(model, peft_config)
        if data_collator is None:
            data_collator = VisionPreferenceCollator(
                processing_class, max_length=args.max_length, turns=turns_of(model)
            )
        if ref_model is not None:
            refuse_other_masks(model, ref_model)
        if not isinstance(train_dataset, Dataset):
            if not any(row.images for row in train_dataset):
                warnings.warn(
                    "no row has a picture: this trains the language model alone", stacklevel=2
                )
            train_dataset = row_table(train_dataset)
            args.remove_unused_columns = False  # rows come whole from memory
        if eval_dataset is not None and not isinstance(eval_dataset, Dataset):
            eval_dataset = row_table(eval_dataset)
        super().__init__(
            model,
            ref_model,
            args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            peft_config=peft_config,
            **more,
        )
        self.extra_losses = tuple(extra_losses)
        self.auxiliary = auxiliary
        self._passes: dict[bool, tuple[int, int]] = {}
        install_length_guard(self.model)
        self._fast = [_FAST[name](self.model, self.ref_model) for name in _FAST if name in fast]

    def _set_signature_columns_if_needed(self) -> None:
        """Keeps our columns: without them a context would be dropped without a word."""
        if self._signature_columns is None:
            super()._set_signature_columns_if_needed()
            ours = PreferenceRow.__dataclass_fields__
            self._signature_columns += [
                name for name in ours if name not in self._signature_columns
            ]

    def compute_ref_log_probs(self, model: Any, inputs: dict[str, Any]) -> Any:
        """As TRL's, on the fast paths."""
        with self._expecting(inputs):
            return super().compute_ref_log_probs(model, inputs)

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Any:
        """TRL's loss, with the extra losses added to it or put in its place."""
        with self._expecting(inputs), contextlib.ExitStack() as stack:
            seen = stack.enter_context(self._watched()) if self.extra_losses else []
            result = super()._compute_loss(model, inputs, return_outputs)
        if not self.extra_losses:
            return result
        loss, outputs = result if return_outputs else (result, None)
        loss, numbers = total_loss(loss, self.extra_losses, _Step(self, model, inputs, seen))
        mode = "train" if self.model.training else "eval"
        for name, value in numbers.items():
            here = torch.tensor(value, device=self.accelerator.device)
            self._metrics[mode][name].append(self.accelerator.gather(here).mean().item())
        return (loss, outputs) if return_outputs else loss

    def _seed_of_pass(self) -> int:
        """Another one in every pass of every process; the same again when a run is resumed."""
        step, training = self.state.global_step, self.model.training
        former, number = self._passes.get(training, (-1, 0))
        number = number + 1 if former == step else 0
        self._passes[training] = (step, number)
        process = self.accelerator.process_index
        return hash((self.args.seed, training, step, number, process)) & 0x7FFFFFFF

    @contextlib.contextmanager
    def _expecting(self, inputs: Mapping[str, Tensor] | None) -> Iterator[None]:
        """Tells the fast paths which batch the coming passes are of."""
        for path in self._fast:
            path.expect(inputs)
        try:
            yield
        finally:
            for path in self._fast:
                path.expect(None)

    @contextlib.contextmanager
    def _watched(self) -> Iterator[list[Tensor]]:
        """Collects the token log-probabilities of all passes inside, in their order."""
        seen: list[Tensor] = []
        models = [unwrap(self.accelerator.unwrap_model(self.model))]
        if self.ref_model is not None:
            models.append(self.accelerator.unwrap_model(self.ref_model))
        handles = [
            one.register_forward_hook(lambda module, args, output: seen.append(output.log_probs))
            for one in models
        ]
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """The model that is the reference: another one, or ours with its adapters off."""
        with torch.no_grad():
            if self.ref_model is not None:
                yield self.ref_model
                return
            if not is_peft_model(self.accelerator.unwrap_model(self.model)):
                raise InputError(
                    "An extra loss asks for the reference, which a full training with a reference "
                    "cache does not keep.",
                    advice="Switch the reference cache off.",
                )
            bare = self.accelerator.unwrap_model(self.model)
            adapter = "ref" if "ref" in bare.peft_config else None
            checkpointing = self.args.gradient_checkpointing_kwargs
            with (
                disable_gradient_checkpointing(self.model, checkpointing),
                use_adapter(bare, adapter),
            ):
                yield self.model


class _Step:
    """One training step as the extra losses see it (`training.losses.Passes`)."""

    def __init__(
        self,
        trainer: VLPreferenceTrainer,
        model: Any,
        inputs: Mapping[str, Tensor],
        seen: Sequence[Tensor],
    ) -> None:
        self._trainer, self._model, self._seen = trainer, model, seen
        self.inputs = inputs
        self.beta = trainer.beta
        self.config = unwrap(trainer.accelerator.unwrap_model(trainer.model)).config
        self.step_seed = trainer._seed_of_pass()

    @property
    def mask(self) -> Tensor:
        return self.inputs["completion_mask"][:, 1:]

    @property
    def policy(self) -> Tensor:
        return self._seen[0] * self.mask

    @property
    def reference(self) -> Tensor:
        if len(self._seen) < 2:
            raise InputError(
                "The reference's log-probabilities are sums from a cache, not single tokens.",
                advice="Switch the reference cache off for this loss.",
            )
        return self._seen[1] * self.mask

    def ratios(self) -> tuple[Tensor, Tensor]:
        chosen, rejected = self.policy.sum(1).chunk(2)
        if "ref_chosen_logps" in self.inputs and len(self._seen) < 2:
            return (
                chosen - self.inputs["ref_chosen_logps"],
                rejected - self.inputs["ref_rejected_logps"],
            )
        ref_chosen, ref_rejected = self.reference.sum(1).chunk(2)
        return chosen - ref_chosen, rejected - ref_rejected

    def again(self, inputs: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
        arguments = self._arguments(inputs)
        policy = self._model(**arguments, fused_lm_head=True).log_probs
        with self._trainer._as_reference() as model:
            reference = model(**arguments, fused_lm_head=True).log_probs
        return policy, reference

    def logits(self, inputs: Mapping[str, Tensor]) -> Tensor:
        arguments = self._arguments(inputs)
        del arguments["labels"]
        checkpointing = self._trainer.args.gradient_checkpointing_kwargs
        with (
            torch.no_grad(),
            disable_gradient_checkpointing(self._trainer.model, checkpointing),
        ):
            return self._model(**arguments).logits

    def auxiliary(self) -> tuple[Tensor, Tensor]:
        batch = self._trainer._prepare_inputs(self._trainer.auxiliary(self.step_seed))
        arguments = self._arguments(batch)
        log_probs = self._model(**arguments, fused_lm_head=True).log_probs
        return log_probs, (arguments["labels"][:, 1:] != -100).to(log_probs.dtype)

    @staticmethod
    def _arguments(inputs: Mapping[str, Tensor]) -> dict[str, Any]:
        arguments = {k: v for k, v in inputs.items() if k not in _NOT_OF_THE_MODEL}
        labels = inputs.get("labels")
        if labels is None:
            labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        return {**arguments, "labels": labels, "use_cache": False}


def _refuse_silent_switches(args: DPOConfig) -> None:
    """Refuses what TRL accepts and does not do, or refuses with advice that leads nowhere."""
    if args.padding_free:
        raise ValueError(
            "padding_free=True does nothing in this version of TRL. Leave it out; "
            "fast=('shared_prefix',) and length grouping save the same padding"
        )
    if args.use_liger_kernel:
        raise ValueError(
            "use_liger_kernel=True would not reach the loss, which computes the head in tiles "
            "already. Leave it out"
        )
    refuse_trl_cache(args)
