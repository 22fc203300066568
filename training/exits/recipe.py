"""The recipe of DyVTE's routers: the model is frozen, labels are computed on the way.

    recipe:
      class_path: training.exits.recipe.DyVTETraining
      init_args:
        model: {name: llava-hf/llava-1.5-7b-hf, methods: ["DyVTE()"], learns: [methods]}
        data: {files: [mix665k_one_percent.json], image_folder: data, max_length: 2048}
        optimisation: {learning_rate: 4.0e-5, batch_size: 128, warmup: 0.03}
        deepspeed: zero2

At the end the routers stand in ``routers.safetensors``, which `DyVTE(weights_file=...)` reads.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError
from training.config import Run
from training.exits.labels import ExitRule
from training.finetune import Parts
from training.saving import Saving
from training.settings import ModelSettings, Optimisation
from training.sft.recipe import SFT, SFTData
from training.tracking.settings import Tracking

if TYPE_CHECKING:
    from mmlm.methods.dyvte import DyVTE
    from training.exits.labels import Measured
    from training.sft.rows import Conversation

__all__ = ["DyVTETraining", "Exits"]

ROUTERS = "routers.safetensors"


@dataclass(frozen=True, kw_only=True)
class Exits:
    """How exits are judged and learned from.

    Attributes:
        per_step: exits that are judged in each step, all different and the same for the whole
            batch (ours: 4; the authors judge one). A further one costs a pass of the text alone
            through the layers above it.
        rule: when an exit is harmless.
        class_weights: of keep and exit in the loss (authors: 1 and 1).
        labels_from: output folder of an earlier training of this model: exits that it has judged
            are not judged again, which makes another rule cheap to try.
        several_answers: what a row with several answers is: judged by its "last"; taken "apart",
            every question about the pictures with its answer as a row; or an "error".

    Raises:
        ValueError: a value is out of its range.
    """

    per_step: int = 4
    rule: ExitRule = field(default_factory=ExitRule)
    class_weights: tuple[float, float] = (1.0, 1.0)
    labels_from: str | None = None
    several_answers: Literal["last", "apart", "error"] = "last"

    def __post_init__(self) -> None:
        if self.per_step < 1:
            raise ValueError(f"per_step = {self.per_step}: must be at least 1")
        if len(self.class_weights) != 2 or not all(w > 0 for w in self.class_weights):
            raise ValueError(f"class_weights = {self.class_weights}: two positive numbers")


class DyVTETraining(SFT):
    """Training of the routers of a built-in DyVTE (arXiv 2411.19628).

    Args:
        model: with ``methods: ["DyVTE(...)"]`` and ``learns: [methods]``.
        data: conversations about pictures; rows without one are left out.
        optimisation: the authors take one epoch, batches of 128, 6e-5 (13B; the paper says 4e-5),
            a warm-up of 0.03 and a cosine.
        exits: how exits are judged.
        deepspeed: name of a shipped DeepSpeed configuration up to zero2_offload, a file, or None.
        saving: checkpoints, the best one, stopping early.
        tracking: logs, trackers.
        export: "model" writes the whole model with its routers; they stand in a file of their own
            in any case.
    """

    def __init__(
        self,
        model: ModelSettings,
        data: SFTData,
        optimisation: Optimisation,
        exits: Exits = Exits(),
        deepspeed: str | None = None,
        saving: Saving = Saving(),
        tracking: Tracking = Tracking(),
        export: tuple[Literal["model"], ...] = (),
    ) -> None:
        super().__init__(model, data, optimisation, deepspeed, saving, tracking, export)
        named = [text.partition("(")[0] for text in model.methods]
        if named.count("DyVTE") != 1 or model.learns != ("methods",) or model.lora is not None:
            raise ValueError(
                f"model.methods = {list(model.methods)}, learns = {list(model.learns)}: routers "
                "are trained alone; give methods: ['DyVTE()'], learns: [methods], no lora"
            )
        if data.packing:
            raise ValueError("packing: a packed row has several prompts, and exits are per prompt")
        self.exits = exits

    def read(self) -> dict[str, list[Conversation]]:
        """The conversations about pictures, to learn from and to evaluate on."""
        from training.launch import say

        found = {}
        for name, rows in super().read().items():
            seen = [row for row in rows if row.images]
            if len(seen) < len(rows):
                lacking = len(rows) - len(seen)
                say(f"{name}: {lacking} of {len(rows)} rows left out: no picture")
            if not seen:
                raise InputError(
                    f"None of the {len(rows)} rows ({name}) has a picture: nothing can exit.",
                    advice="Give conversations about pictures.",
                )
            if self.exits.several_answers == "error":
                _refuse_several(seen)
            elif self.exits.several_answers == "apart":
                seen = [part for row in seen for part in _apart(row)]
            found[name] = seen
        return found

    def build(self, run: Run, parts: Parts) -> Any:
        """The trainer, its rows measured."""
        from training.exits.collator import ExitCollator
        from training.exits.labels import LabelFile
        from training.exits.trainer import ExitTrainer
        from training.gather import process_count
        from training.sft.encoding import Encoder

        method = _built_dyvte(parts.model)
        _refuse_sharded(parts.arguments)
        gates = method.gates(len(parts.model.get_decoder().layers))
        if self.exits.per_step > len(gates):
            raise InputError(
                f"exits.per_step = {self.exits.per_step}, but {method.label} has routers at "
                f"{len(gates)} layers.",
                advice="Lower per_step.",
            )
        encoder = Encoder(parts.processor, self.data.end_token)
        examples = {
            name: self._examples(name, rows, encoder, run.seed) for name, rows in parts.rows.items()
        }
        origin = {"model": self.model.name}
        return ExitTrainer(
            method=method,
            rule=self.exits.rule,
            exits_per_step=self.exits.per_step,
            class_weights=self.exits.class_weights,
            label_file=LabelFile(run.output, _rank() if process_count() > 1 else 0, origin),
            known=self._known(origin),
            model=parts.model,
            args=parts.arguments,
            train_dataset=examples["train"],
            eval_dataset=examples.get("eval"),
            processing_class=parts.processor,
            data_collator=ExitCollator(encoder),
            callbacks=parts.callbacks,
        )

    def _known(self, origin: dict[str, Any]) -> dict[tuple[str, int], Measured]:
        from pathlib import Path

        from training.exits.labels import read_labels

        if self.exits.labels_from is None:
            return {}
        return read_labels(Path(self.exits.labels_from), origin)

    def after_training(self, run: Run, trainer: Any) -> None:
        """Writes the routers into a file of their own."""
        from mmlm.engine.weights import store
        from training.gather import on_main

        on_main(lambda: store(trainer.model, "DyVTE", run.output / ROUTERS))


def _rank() -> int:
    import torch

    return torch.distributed.get_rank()


def _built_dyvte(model: Any) -> DyVTE:
    """The DyVTE that is built in, alone but for methods that open attention."""
    from mmlm.engine.build_in import built_in
    from mmlm.methods.dyvte import DyVTE

    methods = built_in(model)
    for method in methods:
        others = method.sites - method.only_looks - {"mask"}
        if not isinstance(method, DyVTE) and others:
            raise InputError(
                f"{method.label} acts at {', '.join(sorted(others))}: what an exit does beside it "
                "cannot be computed from one pass.",
                advice="Train the routers on a model without it.",
            )
    return next(method for method in methods if isinstance(method, DyVTE))


def _refuse_sharded(arguments: Any) -> None:
    plugin = getattr(arguments, "deepspeed_plugin", None)
    if plugin is not None and plugin.zero_stage == 3:
        raise InputError(
            "Exits are judged by passes that begin in the middle of the model, which ZeRO-3 cannot "
            "follow.",
            advice="Give deepspeed: zero2; only the routers have an optimizer state.",
        )


def _apart(row: Conversation) -> list[Conversation]:
    """Each question of a conversation with its answer, about the pictures of the first question."""
    from dataclasses import replace

    system = [one for one in row.messages if one["role"] == "system"]
    turns = [one for one in row.messages if one["role"] != "system"]
    if len(turns) == 2:
        return [row]
    pictures = [part for part in turns[0]["content"] if part["type"] == "image"]
    later = [part for one in turns[1:] for part in one["content"] if part["type"] == "image"]
    if later:
        raise InputError(
            f"{row.place}: row {row.id!r} has pictures in later turns, so its turns do not stand "
            "alone.",
            advice="Set exits.several_answers: last.",
        )
    parts = []
    for number, (asked, answer) in enumerate(zip(turns[::2], turns[1::2], strict=True)):
        if number:
            asked = {**asked, "content": [*pictures, *asked["content"]]}
        messages = (*system, asked, answer)
        parts.append(replace(row, id=f"{row.id}#{number + 1}", messages=messages))
    return parts


def _refuse_several(rows: list[Conversation]) -> None:
    for row in rows:
        answers = sum(one["role"] == "assistant" for one in row.messages)
        if answers > 1:
            raise InputError(
                f"{row.place}: row {row.id!r} has {answers} answers.",
                advice="Leave such rows out, or set exits.several_answers: last.",
            )
