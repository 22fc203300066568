"""The recipe of preference training: C-DPO, MIA-DPO, plain DPO and their relatives.

    recipe:
      class_path: training.preference.recipe.Preference
      init_args:
        model: {name: llava-hf/llava-1.5-7b-hf, dtype: bfloat16, lora: {r: 128, alpha: 256}}
        data: {files: [runs/sentinel/pairs.jsonl]}
        loss: {types: [sigmoid], beta: 0.1}
        optimisation: {learning_rate: 2.0e-6, batch_size: 64}
        fast: [features_once, shared_prefix]
        deepspeed: zero2

What is special about C-DPO (SENTINEL, arXiv 2507.12455, equation 6) is in the data: the context is
part of the prompt, so it is read and never scored.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError
from training.config import Run
from training.finetune import Finetuning, Parts
from training.losses import parse_extra_loss
from training.losses.settings import LossSettings, check_loss
from training.saving import Saving
from training.settings import ModelSettings, Optimisation
from training.tracking.settings import Tracking

if TYPE_CHECKING:
    from training.preference.rows import PreferenceRow

__all__ = ["Preference", "PreferenceData"]


@dataclass(frozen=True, kw_only=True)
class PreferenceData:
    """Where the pairs are, which of them are taken, and how they become tokens.

    Attributes:
        files: JSON lines as `mmlm data sentinel`, `mmlm data mia` and `mmlm data convert` write
            them.
        eval_files: likewise, for the loss and the accuracy on pairs that are not learned from.
        share: take this share of the pairs, in (0, 1]; which ones depends on their ids alone, and
            a larger share holds every smaller one.
        end_token: where an answer's end is learned: "own" behind answers that end the turn,
            "never", or "always".
        max_length: longest row in tokens, pictures included; None for no limit. Nothing is ever
            cut off.
        overlong: what a longer row is: an "error", or left out ("drop").
        on_bad_image: what an unreadable picture is: an "error", or its row is left out ("drop").

    Raises:
        ValueError: a value is out of its range, or there is no file.
    """

    files: tuple[str, ...]
    eval_files: tuple[str, ...] = ()
    share: float = 1.0
    end_token: Literal["own", "never", "always"] = "own"
    max_length: int | None = None
    overlong: Literal["error", "drop"] = "error"
    on_bad_image: Literal["error", "drop"] = "error"

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files is empty: give at least one file of pairs")
        if not 0 < self.share <= 1:
            raise ValueError(f"share = {self.share}: must be in (0, 1]")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length = {self.max_length}: must be at least 1, or null")

    def taken(self, rows: Sequence[PreferenceRow]) -> list[PreferenceRow]:
        """The rows of the share, in their order."""
        if self.share == 1:
            return list(rows)
        number = round(self.share * len(rows))
        ranked = sorted(range(len(rows)), key=lambda i: (zlib.crc32(rows[i].id.encode()), i))
        if number < 1:
            raise InputError(
                f"share = {self.share} of {len(rows)} pairs is none.",
                advice="Raise `share`, or give more pairs.",
            )
        return [rows[i] for i in sorted(ranked[:number])]


class Preference(Finetuning):
    """Preference training on pairs of answers.

    Args:
        model: what learns, and from where.
        data: the pairs.
        optimisation: learning rate, batch, length.
        loss: TRL's losses and their weights.
        extra_losses: further terms, such as "MDPO(weight=1.0)" (`training.losses`).
        auxiliary: conversations for losses that need other data (HA-DPO), in the forms that `sft`
            reads; None otherwise.
        reference_cache: compute the reference's values once, before the first step, and keep them
            beside the output: one forward pass less a step, and no reference in memory.
        fast: "features_once" and "shared_prefix", see `VLPreferenceTrainer`.
        deepspeed: name of a shipped DeepSpeed configuration (zero0 ... zero3_offload), a file, or
            None.
        saving: checkpoints, the best one, stopping early.
        tracking: logs, trackers, samples.
        export: what is written at the end: "adapter", "merged", "model".
    """

    def __init__(
        self,
        model: ModelSettings,
        data: PreferenceData,
        optimisation: Optimisation,
        loss: LossSettings = LossSettings(),
        extra_losses: tuple[str, ...] = (),
        auxiliary: tuple[str, ...] = (),
        reference_cache: bool = False,
        fast: tuple[Literal["features_once", "shared_prefix"], ...] = (),
        deepspeed: str | None = None,
        saving: Saving = Saving(),
        tracking: Tracking = Tracking(),
        export: tuple[Literal["adapter", "merged", "model"], ...] = ("model",),
    ) -> None:
        super().__init__(model, optimisation, deepspeed, saving, tracking, export)
        self.data, self.loss, self.fast = data, loss, fast
        self.extra_losses = tuple(parse_extra_loss(text) for text in extra_losses)
        self.auxiliary, self.reference_cache = auxiliary, reference_cache
        if optimisation.projector_learning_rate is not None:
            raise ValueError(
                "projector_learning_rate: preference training has one rate. Leave it out"
            )
        if bool(auxiliary) != any(one.needs_auxiliary for one in self.extra_losses):
            raise ValueError(
                "`auxiliary` and extra_losses with AuxiliarySFT belong together: give both or none"
            )
        check_loss(
            loss.types, loss.weights, loss.beta, ld_alpha=loss.ld_alpha,
            label_smoothing=loss.label_smoothing, extra=self.extra_losses,
        )  # fmt: skip

    def read(self) -> dict[str, list[PreferenceRow]]:
        """The rows to learn from and those to evaluate on."""
        from training.preference.rows import read_rows

        rows = self.data.taken(read_rows(self.data.files))
        evaluation = read_rows(self.data.eval_files) if self.data.eval_files else []
        if both := {row.id for row in rows} & {row.id for row in evaluation}:
            raise InputError(
                f"{len(both)} pairs stand in `files` and in `eval_files`, such as {min(both)!r}.",
                advice="Evaluate on pairs that are not learned from.",
            )
        return {"train": rows, "eval": evaluation}

    def arguments_class(self) -> tuple[type, dict[str, Any]]:
        """TRL's DPOConfig, and what it has beyond the Trainer's arguments."""
        from trl import DPOConfig

        return DPOConfig, {**self.loss.for_trl(), "max_length": None}

    def build(self, run: Run, parts: Parts) -> Any:
        """The trainer, its rows checked."""
        from training.lora import lora_config
        from training.model import load_for_training, whole_modules
        from training.preference.collator import VisionPreferenceCollator
        from training.preference.features import check_features
        from training.preference.table import row_table
        from training.preference.trainer import VLPreferenceTrainer
        from training.turns import turns_of

        collator = VisionPreferenceCollator(
            parts.processor,
            max_length=self.data.max_length,
            overlong=self.data.overlong,
            end_token=self.data.end_token,
            on_bad_image=self.data.on_bad_image,
            turns=turns_of(parts.model),
        )
        _refuse_mixed_under_zero3(parts)
        tables = {}
        for name, rows in parts.rows.items():
            if rows:
                kept, lengths = self._usable(name, rows, collator)
                tables[name] = row_table(kept, lengths)
                if not _has_zero3(parts):  # whose weights are shared out already
                    check_features(parts.model, collator, kept)
        adapters = None
        if self.model.lora is not None:
            whole = whole_modules(parts.model, self.model)
            adapters = lora_config(parts.model, self.model.lora, whole=whole)
        return VLPreferenceTrainer(
            parts.model,
            None if adapters else load_for_training(self.model)[0].requires_grad_(False),
            parts.arguments,
            train_dataset=tables["train"],
            eval_dataset=tables.get("eval"),
            processing_class=parts.processor,
            data_collator=collator,
            peft_config=adapters,
            extra_losses=self.extra_losses,
            fast=self.fast,
            auxiliary=self._auxiliary_batches(parts),
            callbacks=parts.callbacks,
        )

    def _usable(
        self, name: str, rows: list[PreferenceRow], collator: Any
    ) -> tuple[list[PreferenceRow], list[int]]:
        """The rows that the model can take and their lengths; says how many were left out."""
        from training.gather import on_main
        from training.launch import say
        from training.preference.usable import usable_rows

        show = self.tracking.progress != "never" and len(rows) > 1000
        # Measured by one process for all of them.
        kept, lengths, left_out = on_main(lambda: usable_rows(rows, collator, show=show))
        for reason, count in left_out.items():
            say(f"{name}: {count} of {len(rows)} pairs left out: {reason}")
        if not kept:
            raise InputError(
                f"No pair of {name!r} can be used ({dict(left_out)}).",
                advice="Check `max_length`, and the paths of the pictures.",
            )
        return kept, lengths

    def _auxiliary_batches(self, parts: Parts) -> Any:
        """What losses with `needs_auxiliary` learn from beside the pairs."""
        if not self.auxiliary:
            return None
        from training.losses.auxiliary import AuxiliaryBatches
        from training.sft.collator import SFTCollator
        from training.sft.data import Examples
        from training.sft.encoding import Encoder
        from training.sft.rows import read_conversations
        from training.turns import refuse_several_answers, turns_of

        rows = read_conversations(self.auxiliary)
        refuse_several_answers(parts.model, rows)
        examples = Examples(rows)
        collate = SFTCollator(Encoder(parts.processor, turns=turns_of(parts.model)))
        return AuxiliaryBatches(examples, collate, self.optimisation.rows_per_pass)

    def before_training(self, run: Run, trainer: Any) -> None:
        """Fills the reference cache, if there is one."""
        if not self.reference_cache:
            return
        from training.preference.precompute import precompute_ref, use_reference_cache

        cache = precompute_ref(
            trainer, run.output / "reference", extra_losses=self.extra_losses, show=True
        )
        use_reference_cache(trainer, cache, self.extra_losses)


def _has_zero3(parts: Parts) -> bool:
    plugin = parts.arguments.deepspeed_plugin
    return plugin is not None and plugin.zero_stage == 3


def _refuse_mixed_under_zero3(parts: Parts) -> None:
    """Refuses rows with and without pictures where the tower's weights are shared out.

    A process whose rows have no picture would never ask for them, and the others would wait.
    """
    if not _has_zero3(parts):
        return
    rows = [row for some in parts.rows.values() for row in some]
    without = sum(not row.images for row in rows)
    if 0 < without < len(rows):
        raise InputError(
            f"{without} of {len(rows)} pairs have no picture: under ZeRO-3 a process with such "
            "pairs alone would leave the others waiting.",
            advice="Use deepspeed: zero2, or leave those pairs out.",
        )
