"""What every fine-tuning does, whatever its loss: read, load, train, resume, export.

The order is chosen so that what can be wrong is found early: first the files of the data, then the
model, then each row against the model; only then does the first step run. Everything between the
first step and the last is the work of transformers' Trainer or TRL's.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

from mmlm.errors import InputError
from training.config import Recipe, Run
from training.saving import Saving
from training.settings import ModelSettings, Optimisation
from training.tracking.settings import Tracking

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

    from training.checkpoints import RunFolder
    from training.model_card import ModelCard

__all__ = ["Export", "Finetuning", "Parts"]

Export: TypeAlias = Literal["adapter", "merged", "model"]


@dataclass(frozen=True)
class Parts:
    """What a recipe builds its trainer from.

    Attributes:
        model: loaded, the parts that do not learn frozen; adapters are the recipe's business.
        processor: of the model.
        rows: what `Finetuning.read` gave.
        arguments: of the trainer.
        callbacks: of the trainer.
    """

    model: PreTrainedModel
    processor: ProcessorMixin
    rows: dict[str, Any]
    arguments: Any
    callbacks: list[Any]


class Finetuning(Recipe):
    """A training of an existing model with a Trainer.

    Args:
        model: what learns, and from where.
        optimisation: learning rate, batch, length.
        deepspeed: name of a shipped DeepSpeed configuration, a file, or None.
        saving: checkpoints.
        tracking: logs.
        export: what is written at the end, in folders of these names.
    """

    def __init__(
        self,
        model: ModelSettings,
        optimisation: Optimisation,
        deepspeed: str | None,
        saving: Saving,
        tracking: Tracking,
        export: tuple[Export, ...],
    ) -> None:
        self.model, self.optimisation, self.deepspeed = model, optimisation, deepspeed
        self.saving, self.tracking, self.export = saving, tracking, export
        if model.lora is None and (wrong := {"adapter", "merged"} & set(export)):
            raise ValueError(f"export = {sorted(wrong)} needs adapters: set model.lora")

    @abstractmethod
    def read(self) -> dict[str, Any]:
        """The rows by their use, "train" and "eval"; files are checked, no model is loaded yet."""

    @abstractmethod
    def arguments_class(self) -> tuple[type, dict[str, Any]]:
        """The class of the trainer's arguments, and values of it that the settings do not have."""

    @abstractmethod
    def build(self, run: Run, parts: Parts) -> Any:
        """The trainer; refuses rows that the model cannot take."""

    def before_training(self, run: Run, trainer: Any) -> None:
        """What must be computed once, before the first step."""

    def after_training(self, run: Run, trainer: Any) -> None:
        """What is written beside the exports; all processes come here."""

    def run(self, run: Run, only: str | None) -> None:
        """See `training.config.Recipe.run`."""
        from training.arguments import deepspeed_file
        from training.checkpoints import open_run
        from training.gather import on_main
        from training.launch import (
            refuse_idle_devices,
            say,
            start_deepspeed,
            watch_for_lost_processes,
        )
        from training.tracking import check

        if only is not None:
            raise InputError(
                f"--only {only}: this recipe has one stage.", advice="Leave --only out."
            )
        check(self.tracking)
        rows = self.read()
        if self.saving.evaluates and not rows.get("eval"):
            raise InputError(
                f"saving.best = {self.saving.best!r}, but there is nothing to evaluate on.",
                advice="Give evaluation files, or leave `best` out.",
            )
        if self.deepspeed is not None:
            deepspeed_file(self.deepspeed)  # refused before any process waits for another
            start_deepspeed()
        refuse_idle_devices()
        arguments = self._arguments(run, evaluates=bool(rows.get("eval")))
        origin = on_main(lambda: self._origin(run))  # hashing the data takes time: once, by one
        with (
            watch_for_lost_processes(run.output),
            open_run(run.output, self._learned(run), origin) as folder,
        ):
            if folder.finished is not None:
                say(f"{run.output} is finished; nothing is left to do.")
                return
            run.write_config()
            self._train(run, rows, arguments, folder, origin)

    def _arguments(self, run: Run, *, evaluates: bool) -> Any:
        from training.arguments import trainer_arguments

        kind, more = self.arguments_class()
        if evaluates and not self.saving.evaluates:
            more = {"eval_strategy": "steps", "eval_steps": self.saving.every, **more}
        return trainer_arguments(
            kind,
            run,
            self.optimisation,
            deepspeed=self.deepspeed,
            report_to=self.tracking.to,
            log_every=self.tracking.log_every,
            more={**self.saving.arguments(), **more},
        )

    def _learned(self, run: Run) -> dict[str, Any]:
        """The configuration without what may change between two sittings of one training."""
        given = run.config["recipe"]["init_args"]
        kept = {k: v for k, v in given.items() if k not in ("tracking", "saving", "export")}
        return {**run.config, "recipe": {**run.config["recipe"], "init_args": kept}}

    def _train(
        self,
        run: Run,
        rows: dict[str, Any],
        arguments: Any,
        folder: RunFolder,
        origin: dict[str, Any],
    ) -> None:
        from transformers.utils import logging as transformers_logging

        from training.checkpoints import train
        from training.export import export
        from training.launch import say
        from training.model import (
            choose_what_learns,
            count_parameters,
            load_for_training,
            refuse_half_precision,
        )
        from training.tracking import tracked

        transformers_logging.disable_progress_bar()  # ours stands in training.tracking
        model, processor = load_for_training(self.model)
        choose_what_learns(model, self.model)
        parts = Parts(model, processor, rows, arguments, self.saving.callbacks())
        trainer = self.build(run, parts)
        master = self.deepspeed is not None and run.settings.precision == "bf16"
        refuse_half_precision(trainer.model, master_weights=master)
        learning, whole = count_parameters(trainer.model)
        say(f"{learning:,} of {whole:,} parameters learn ({100 * learning / whole:.2f} %).")
        self.before_training(run, trainer)
        with tracked(trainer, self.tracking, run_config=run.config, output=run.output):
            train(trainer, folder)
        self.after_training(run, trainer)
        card = self._card(run, origin)
        for what in self.export:
            export(trainer.model, processor, run.output / what, what, card, replace=True)
        folder.finish({"steps": trainer.state.global_step, "log": trainer.state.log_history[-2:]})

    def _origin(self, run: Run) -> dict[str, Any]:
        """Where the trained model comes from, beside its configuration."""
        from training.model_card import data_hashes, git_revision

        files = run.config["recipe"]["init_args"]["data"]["files"]
        return {
            "command": list(run.command),
            "revision": git_revision(),
            "data": data_hashes(files),
        }

    def _card(self, run: Run, origin: dict[str, Any]) -> ModelCard:
        """What the exported model says about its origin."""
        from training.model_card import ModelCard

        command = " ".join(origin["command"])
        return ModelCard(
            base_model=self.model.name, configuration=run.config, **{**origin, "command": command}
        )
