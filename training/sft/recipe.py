"""The recipe of supervised fine-tuning: one class for both of LLaVA's stages, and any later one.

    recipe:
      class_path: training.sft.recipe.SFT
      init_args:
        model: {name: llava-hf/llava-1.5-7b-hf, learns: [language, projector]}
        data: {files: [llava_v1_5_mix665k.json], image_folder: data, max_length: 2048}
        optimisation: {learning_rate: 2.0e-5, batch_size: 128, warmup: 0.03}
        deepspeed: zero3

What a stage is depends on what learns: ``learns: [projector]`` is LLaVA's alignment (stage 1),
``[language, projector]`` its instruction tuning (stage 2), with ``lora`` on adapters.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from training.config import Run
from training.finetune import Finetuning, Parts
from training.saving import Saving
from training.settings import ModelSettings, Optimisation
from training.tracking.settings import Tracking

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from training.sft.data import Examples, Measured
    from training.sft.encoding import Encoder
    from training.sft.rows import Conversation

__all__ = ["SFT", "SFTData"]


@dataclass(frozen=True, kw_only=True)
class SFTData:
    """Where the conversations are, and how they become rows.

    Attributes:
        files: conversations in LLaVA's form or as chat messages (`training.sft.rows`).
        eval_files: likewise, for the loss on conversations that are not learned from.
        image_folder: where relative paths of pictures start; None for the folder of their file.
        max_length: longest row in tokens, pictures included; None for no limit. Nothing is ever
            cut off.
        overlong: what a longer row is: an "error", or left out ("drop").
        packing: put several conversations into a row of at most `max_length` tokens, each of which
            sees itself only (`training.sft.packing`). `batch_size` counts packed rows then.
        end_token: where the end token of an answer comes from: the "template", which must write
            one; "eos", the tokenizer's where the template writes none; "none" where the template
            writes none and none is wanted.
        on_bad_image: what an unreadable picture is: an "error", or its row is left out ("drop").
        workers: processes that read pictures beside the training; 0 reads between two steps.

    Raises:
        ValueError: a value is out of its range, or there is no file.
    """

    files: tuple[str, ...]
    eval_files: tuple[str, ...] = ()
    image_folder: str | None = None
    max_length: int | None = None
    overlong: Literal["error", "drop"] = "error"
    packing: bool = False
    end_token: Literal["template", "eos", "none"] = "template"
    on_bad_image: Literal["error", "drop"] = "error"
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files is empty: give at least one file of conversations")
        if self.max_length is not None and self.max_length < 1:
            raise ValueError(f"max_length = {self.max_length}: must be at least 1, or null")
        if self.packing and self.max_length is None:
            raise ValueError("packing needs max_length: the tokens of a packed row")
        if self.workers < 0:
            raise ValueError(f"workers = {self.workers}: must be 0 or more")


class SFT(Finetuning):
    """Supervised fine-tuning on conversations about pictures.

    Args:
        model: what learns, and from where.
        data: the conversations.
        optimisation: learning rate, batch, length.
        deepspeed: name of a shipped DeepSpeed configuration (zero0 ... zero3_offload), a file, or
            None.
        saving: checkpoints, the best one, stopping early.
        tracking: logs, trackers, samples.
        export: what is written at the end: "adapter", "merged", "model".
    """

    def __init__(
        self,
        model: ModelSettings,
        data: SFTData,
        optimisation: Optimisation,
        deepspeed: str | None = None,
        saving: Saving = Saving(),
        tracking: Tracking = Tracking(),
        export: tuple[Literal["adapter", "merged", "model"], ...] = ("model",),
    ) -> None:
        super().__init__(model, optimisation, deepspeed, saving, tracking, export)
        if optimisation.projector_learning_rate is not None and "projector" not in model.learns:
            raise ValueError("projector_learning_rate is given, but `learns` has no projector")
        self.data = data

    def read(self) -> dict[str, list[Conversation]]:
        """The conversations to learn from and those to evaluate on."""
        from training.sft.rows import read_conversations

        data = self.data
        rows = {"train": read_conversations(data.files, data.image_folder)}
        if data.eval_files:
            rows["eval"] = read_conversations(data.eval_files, data.image_folder)
        return rows

    def arguments_class(self) -> tuple[type, dict[str, Any]]:
        """TrainingArguments, and what its trainer must know about evaluation and reading."""
        from transformers import TrainingArguments

        return TrainingArguments, {
            "label_names": ["labels"],
            "prediction_loss_only": True,
            "dataloader_num_workers": self.data.workers,
        }

    def build(self, run: Run, parts: Parts, kind: type | None = None) -> Any:
        """The trainer, its rows measured; ``kind`` is its class (default: `SFTTrainer`)."""
        from training.launch import world
        from training.sft.collator import SFTCollator
        from training.sft.encoding import Encoder
        from training.sft.packing import check_packing, rope_index
        from training.sft.trainer import SFTTrainer
        from training.turns import refuse_several_answers, turns_of

        encoder = Encoder(parts.processor, self.data.end_token, turns=turns_of(parts.model))
        for rows in parts.rows.values():
            refuse_several_answers(parts.model, rows)
        if self.data.packing:
            check_packing(parts.model, self.optimisation.rows_per_pass)
        examples = {
            name: self._examples(name, rows, encoder, run.seed) for name, rows in parts.rows.items()
        }
        collator = SFTCollator(
            encoder,
            packed=self.data.packing,
            rope=rope_index(parts.model) if self.data.packing else None,
            dummy_picture=world() > 1,
        )
        model, projector = self._adapted(parts.model, parts.arguments)
        return (kind or SFTTrainer)(
            model=model,
            args=parts.arguments,
            train_dataset=examples["train"],
            eval_dataset=examples.get("eval"),
            processing_class=parts.processor,
            data_collator=collator,
            callbacks=parts.callbacks,
            projector=projector,
            projector_learning_rate=self.optimisation.projector_learning_rate,
        )

    def _adapted(self, model: PreTrainedModel, arguments: Any) -> tuple[Any, tuple[Any, ...]]:
        """The model with its adapters, if any, and the projector's parameters that learn."""
        from training.lora import lora_config
        from training.model import whole_modules

        names = ()
        if "projector" in self.model.learns:
            names = whole_modules(
                model, replace(self.model, learns=("projector",), method_parts=(), lora=None)
            )
        inner: Any = model
        if self.model.lora is not None:
            from peft import get_peft_model

            whole = whole_modules(model, self.model)
            # Under ZeRO-3 the tensors of a group must have one number format (DeepSpeed 8072).
            sharded = arguments.deepspeed_plugin is not None and (
                arguments.deepspeed_plugin.zero_stage == 3
            )
            wrapped: Any = get_peft_model(
                model,
                lora_config(model, self.model.lora, whole=whole),
                autocast_adapter_dtype=not sharded,
            )
            if arguments.gradient_checkpointing:
                wrapped.enable_input_require_grads()
                if sharded:  # where recomputing has to gather, only the older way works (TRL)
                    arguments.gradient_checkpointing_kwargs = {"use_reentrant": True}
            inner, model = wrapped.get_base_model(), wrapped
        projector = tuple(
            p for name in names for p in inner.get_submodule(name).parameters() if p.requires_grad
        )
        return model, projector

    def _examples(
        self, name: str, rows: list[Conversation], encoder: Encoder, seed: int
    ) -> Examples:
        from training.launch import say
        from training.sft.data import Examples

        data = self.data
        if data.max_length is None and not self.optimisation.group_by_length:
            return Examples(rows, on_bad_image=data.on_bad_image)
        measured = self._measured(name, rows, encoder)
        for reason, count in measured.dropped.items():
            say(f"{name}: {count} of {len(rows)} conversations left out: {reason}")
        examples = Examples(
            rows,
            measured,
            capacity=data.max_length if data.packing else None,
            seed=seed,
            on_bad_image=data.on_bad_image,
        )
        if data.packing:
            full = sum(measured.lengths) / (len(examples) * (data.max_length or 1))
            say(
                f"{name}: {len(measured.kept)} conversations in {len(examples)} rows of "
                f"{data.max_length} tokens, {100 * full:.1f} % full"
            )
        return examples

    def _measured(self, name: str, rows: list[Conversation], encoder: Encoder) -> Measured:
        """Measured by one process for all of them."""
        from mmlm.progress import progress_bar
        from training.gather import on_main
        from training.sft.data import measure

        data = self.data

        def work() -> Measured:
            show = self.tracking.progress != "never" and len(rows) > 1000
            with progress_bar(len(rows), show, f"Measuring {name}") as advance:

                def counted(rows: Any) -> Any:
                    for row in rows:
                        yield row
                        advance(1, "")

                return measure(
                    rows,
                    encoder,
                    max_length=data.max_length,
                    overlong=data.overlong,
                    on_bad_image=data.on_bad_image,
                    progress=counted,
                )

        measured: Measured = on_main(work)
        return measured
