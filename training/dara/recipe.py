"""The recipe of DARA: factors learned on episodes whose rule only the demonstrations tell.

    recipe:
      class_path: training.dara.recipe.DARATraining
      init_args:
        model: {name: ..., methods: ["DARA(images=5)"], learns: [methods]}
        data: {files: [support/episodes.jsonl]}

One training for each set of factors (a task's own, or one for all) and each learning rate; of
each set the rate with the least loss on held-out episodes is kept. With ``lora`` in the place of
DARA the same course trains adapters on the same episodes. No value of the paper's training is
known: every number here is ours.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from training.config import Run
from training.finetune import Finetuning, Parts
from training.saving import Saving
from training.settings import ModelSettings, Optimisation
from training.sft.recipe import SFT, SFTData
from training.tracking.settings import Tracking

if TYPE_CHECKING:
    from training.dara.episodes import EpisodeRow

__all__ = ["DARATraining", "EpisodeData"]


_OPTIMISATION = Optimisation(
    learning_rate=3e-3, batch_size=8, steps=300, schedule="constant", weight_decay=0.0
)
_SAVING = Saving(every=25, best="loss", patience=4)


@dataclass(frozen=True, kw_only=True)
class EpisodeData:
    """Where the episodes are.

    Attributes:
        files: episodes of the support split, as `mmlm data micl --split support` writes them.
        tasks: the tasks that are used; None for all there are.
        sets: one set of factors for each "task", or one ("joint").
        held_out: share of the episodes that is not learned from: its loss chooses the learning
            rate, and stops a training early.
        end_token: where the end token of an answer comes from, see `training.sft.recipe`.
        workers: processes that read pictures beside the training.

    Raises:
        ValueError: a value is out of its range, or there is no file.
    """

    files: tuple[str, ...]
    tasks: tuple[str, ...] | None = None
    sets: Literal["task", "joint"] = "task"
    held_out: float = 0.2
    end_token: Literal["template", "eos", "none"] = "template"
    workers: int = 0

    def __post_init__(self) -> None:
        if not self.files:
            raise ValueError("files is empty: give at least one file of episodes")
        if self.tasks is not None and not self.tasks:
            raise ValueError("tasks is empty: name at least one, or null for all")
        if not 0 < self.held_out < 1:
            raise ValueError(f"held_out = {self.held_out}: a share in (0, 1)")
        if self.workers < 0:
            raise ValueError(f"workers = {self.workers}: must be 0 or more")


class DARATraining(SFT):
    """Training of DARA's factors, or of adapters beside it, on episodes.

    Args:
        model: what learns, and from where.
        data: the episodes.
        optimisation: batch, steps, clipping; its learning rate is only used where `rates` is empty.
        rates: learning rates that are tried.
        train_only_dara: refuse a run in which anything but DARA's factors would learn.
        deepspeed: name of a shipped DeepSpeed configuration, a file, or None.
        saving: evaluation on the held-out episodes, checkpoints, stopping early.
        tracking: logs.
        export: whole models and adapters that are written for every rate; the factors are written
            in any case.
    """

    def __init__(
        self,
        model: ModelSettings,
        data: EpisodeData,
        optimisation: Optimisation = _OPTIMISATION,
        rates: tuple[float, ...] = (1e-3, 3e-3, 1e-2),
        train_only_dara: bool = True,
        deepspeed: str | None = None,
        saving: Saving = _SAVING,
        tracking: Tracking = Tracking(),
        export: tuple[Literal["adapter", "merged", "model"], ...] = (),
    ) -> None:
        conversations = SFTData(files=data.files, end_token=data.end_token, workers=data.workers)
        super().__init__(model, conversations, optimisation, deepspeed, saving, tracking, export)
        if any(rate <= 0 for rate in rates) or len(set(rates)) < len(rates):
            raise ValueError(f"rates = {list(rates)}: different and positive")
        if saving.best != "loss":
            raise ValueError(
                f"saving.best = {saving.best!r}: rates are chosen by the held-out loss; give loss"
            )
        self.episodes, self.train_only_dara = data, train_only_dara
        self.rates = rates or (optimisation.learning_rate,)
        self._rows: list[EpisodeRow] = []

    def run(self, run: Run, only: str | None) -> None:
        """See `training.config.Recipe.run`. Finished parts are not done again."""
        from transformers import set_seed

        from mmlm.errors import InputError
        from training.dara.choice import choose
        from training.dara.episodes import by_set, read_episodes

        rows = read_episodes(self.episodes.files)
        sets = by_set(rows, self.episodes.tasks, self.episodes.sets == "joint")
        if only is not None and only not in sets:
            raise InputError(
                f"--only {only}: the sets of this run are {', '.join(sets)}.",
                advice="Name one of them, or leave --only out.",
            )
        for name in sets if only is None else [only]:
            for rate in self.rates:
                part = copy.copy(self)
                part._rows = sets[name]
                part.optimisation = replace(self.optimisation, learning_rate=rate)
                folder = run.output / name / f"{rate:g}"
                folder.mkdir(parents=True, exist_ok=True)
                config = {**run.config, "set": name, "rate": rate}
                set_seed(run.seed)  # adapters start alike, whatever was trained before
                Finetuning.run(part, replace(run, output=folder, config=config), None)
            choose(run.output, name, self.rates)

    def read(self) -> dict[str, Any]:
        """The episodes of one set, some of them held out."""
        from training.dara.episodes import split

        return split(self._rows, self.episodes.held_out)

    def build(self, run: Run, parts: Parts) -> Any:
        """The trainer; refuses what would learn beside DARA, and images without a slot."""
        from training.dara.learning import built_dara, refuse_images, refuse_others
        from training.dara.trainer import CalmTrainer

        method = built_dara(parts.model)
        for rows in parts.rows.values():
            refuse_images(method, rows)
        trainer = super().build(run, parts, kind=CalmTrainer)
        refuse_others(trainer.model, train_only_dara=self.train_only_dara)
        return trainer

    def after_training(self, run: Run, trainer: Any) -> None:
        """Writes the factors, and what is known about them."""
        from training.dara.choice import write_result

        shots = max(row.shots for row in self._rows)
        tasks = list(dict.fromkeys(row.task for row in self._rows))
        write_result(
            run.output,
            trainer,
            {
                "base_model": self.model.name,
                "tasks": tasks,
                "n_shots": shots,
                "learning_rate": self.optimisation.learning_rate,
                "seed": run.seed,
            },
        )
