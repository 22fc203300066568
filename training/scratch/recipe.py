"""The recipe of the embedded model: a LLaVA from nothing, in four or five stages.

1. vision and language side by side, each in a process of its own with one thread: the tower
   learns to name the object in each patch, the language model learns the captions' language;
2. the projector alone;
3. alignment: everything, the tower at a lower rate;
4. refinement, if asked for: a second period of it with a new schedule, in which the tower learns at
   full rate and keeps its patch loss.

Each stage has a folder with its snapshot and log; the finished model is the folder `model`, which
plain transformers reads.
"""

from __future__ import annotations

import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mmlm.errors import InputError
from mmlm.model.assemble import SPECIAL_TOKENS, assemble, word_processor
from mmlm.model.checkpoint import save
from training.config import Recipe, Run
from training.scratch.alignment import AlignmentStage, ProjectorStage, RefinementStage
from training.scratch.language import LanguageStage
from training.scratch.loop import Stage, StageSettings, run_stage
from training.scratch.source import Source, Tail
from training.scratch.vision import VisionStage, patch_head

if TYPE_CHECKING:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
    )

__all__ = ["FromScratch", "Shape"]

ANSWER_TOKENS = 84
"""Default length of an answer of the finished model."""

_JOINT = ("question_weight", "tower_rate", "question_tokens")
_REFINED = ("refinement", "patch_weight", "refinement_source", "emphasis")
_LATER = {
    "vision": ("language", "max_tokens", "projector", "alignment", *_JOINT, *_REFINED),
    "language": ("projector", "alignment", *_JOINT, *_REFINED),
    "projector": ("alignment", *_REFINED),
    "alignment": _REFINED,
    "refinement": (),
}
"""Arguments of the recipe that do not change what a stage learns."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the model.

    Attributes:
        image_size: side of the picture in pixels, a multiple of `patch_size`.
        patch_size: side of a patch in pixels.
        vision_width: hidden size of the tower.
        vision_mlp: intermediate size of the tower.
        vision_layers: layers of the tower.
        vision_heads: attention heads of the tower.
        text_width: hidden size of the language model.
        text_mlp: intermediate size of the language model.
        text_layers: layers of the language model.
        text_heads: attention heads of the language model (no grouping).
        max_positions: longest sequence.
        pixel_mean: subtracted from pixels of 0 to 255.
        pixel_std: pixels are divided by it.
    """

    image_size: int = 80
    patch_size: int = 8
    vision_width: int = 160
    vision_mlp: int = 640
    vision_layers: int = 4
    vision_heads: int = 5
    text_width: int = 192
    text_mlp: int = 512
    text_layers: int = 8
    text_heads: int = 6
    max_positions: int = 512
    pixel_mean: float = 127.5
    pixel_std: float = 64.0

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(
                f"image_size = {self.image_size} is not a multiple of patch_size = "
                f"{self.patch_size}"
            )

    def vision_config(self) -> CLIPVisionConfig:
        """The tower's configuration."""
        from transformers import CLIPVisionConfig

        return CLIPVisionConfig(
            image_size=self.image_size,
            patch_size=self.patch_size,
            hidden_size=self.vision_width,
            intermediate_size=self.vision_mlp,
            num_hidden_layers=self.vision_layers,
            num_attention_heads=self.vision_heads,
            hidden_act="gelu",
        )

    def text_config(self, vocabulary: int) -> LlamaConfig:
        """The language model's configuration for a number of words, specials included."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=self.text_width,
            intermediate_size=self.text_mlp,
            num_hidden_layers=self.text_layers,
            num_attention_heads=self.text_heads,
            num_key_value_heads=self.text_heads,
            max_position_embeddings=self.max_positions,
            tie_word_embeddings=True,
            pad_token_id=SPECIAL_TOKENS.index("<pad>"),
            bos_token_id=SPECIAL_TOKENS.index("<bos>"),
            eos_token_id=SPECIAL_TOKENS.index("<eos>"),
        )


class FromScratch(Recipe):
    """Trains tower, language model and projector of a small LLaVA from random weights.

    Args:
        source: pictures and texts.
        vision: stage V.
        language: stage L.
        projector: stage A, first part.
        alignment: stage A, second part.
        refinement: stage A once more, None to leave it out.
        shape: sizes of the model.
        question_weight: factor on the question loss in stage A.
        tower_rate: factor on the tower's learning rate in stage A.
        max_tokens: longest text behind the image.
        question_tokens: longest question round.
        patch_weight: factor on the patch loss in the refinement.
        refinement_source: pictures and texts of the refinement, None for those of the others.
        emphasis: how much content words count in the refinement.
    """

    def __init__(
        self,
        source: Source,
        vision: StageSettings,
        language: StageSettings,
        projector: StageSettings,
        alignment: StageSettings,
        refinement: StageSettings | None = None,
        shape: Shape = Shape(),
        question_weight: float = 0.7,
        tower_rate: float = 0.3,
        max_tokens: int = 120,
        question_tokens: int = 56,
        patch_weight: float = 0.3,
        refinement_source: Source | None = None,
        emphasis: float = 1.0,
    ) -> None:
        self.source, self.shape = source, shape
        self.question_weight, self.tower_rate = question_weight, tower_rate
        self.max_tokens, self.question_tokens = max_tokens, question_tokens
        self.patch_weight, self.refinement_source = patch_weight, refinement_source
        self.emphasis = emphasis
        self.settings = {
            "vision": vision,
            "language": language,
            "projector": projector,
            "alignment": alignment,
        }
        if refinement is not None:
            self.settings["refinement"] = refinement

    def run(self, run: Run, only: str | None) -> None:
        """See `training.config.Recipe.run`."""
        if only is not None:
            if only not in self.settings:
                raise InputError(
                    f"stage {only!r} is unknown", advice=f"Take one of {list(self.settings)}."
                )
            self._train(only, run)
            return
        run.write_config()
        if run.accelerator.num_processes == 1:
            # Two small trainings on a thread each make more steps than one after the other on two.
            _launch(run, {"vision": 1, "language": 1})
            for stage in list(self.settings)[2:]:
                _launch(run, {stage: run.settings.processes})
        else:
            for stage in self.settings:
                self._train(stage, run)
        if run.accelerator.is_main_process:
            self._export(run.output)

    def _train(self, name: str, run: Run) -> None:
        run_stage(
            self._stage(name, run),
            self.settings[name],
            run.output / name,
            run.accelerator,
            fingerprint=run.fingerprint(without=_LATER[name]),
            snapshot_seconds=run.settings.snapshot_seconds,
            log_every=run.settings.log_every,
        )

    def _stage(self, name: str, run: Run) -> Stage:
        """A stage with the weights that the stages before it left."""
        from transformers import CLIPVisionModel, LlamaForCausalLM

        torch.manual_seed(run.seed)
        processor = self._processor()
        whole = self.refinement_source if name == "refinement" else None
        source = Tail(whole or self.source, self._first_index(name))
        batch_size = self.settings[name].batch_size
        pixels = {"pixel_mean": self.shape.pixel_mean, "pixel_std": self.shape.pixel_std}
        residual = torch.bfloat16 if run.settings.precision == "bf16" else torch.float32
        text: dict[str, Any] = {
            "max_tokens": self.max_tokens,
            "residual_dtype": residual,
            "seed": run.seed,
        }
        if name == "vision":
            tower = CLIPVisionModel(self.shape.vision_config())
            return VisionStage(tower, source, batch_size, **pixels)
        if name == "language":
            language = LlamaForCausalLM(self.shape.text_config(len(processor.tokenizer)))
            return LanguageStage(language, processor.tokenizer, source, batch_size, **text)
        model = self._assemble(processor)
        self._load(model, name, run.output)
        joint: dict[str, Any] = {
            "question_tokens": self.question_tokens,
            "question_weight": self.question_weight,
            "tower_rate": self.tower_rate,
            **text,
            **pixels,
        }
        kind = {"projector": ProjectorStage, "alignment": AlignmentStage}.get(name, RefinementStage)
        if kind is RefinementStage:
            head = patch_head(self.shape.vision_width, source.n_classes)
            head.load_state_dict(_part(run.output, "vision", "patch_head."))
            joint |= {"patch_head": head, "patch_weight": self.patch_weight, "tower_rate": 1.0}
            joint["emphasis"] = self.emphasis
        return kind(model, processor.tokenizer, source, batch_size, **joint)

    def _load(self, model: LlavaForConditionalGeneration, stage: str, output: Path) -> None:
        """The weights that the stage before left."""
        if stage == "projector":
            model.model.vision_tower.load_state_dict(_part(output, "vision", "tower."))
            model.model.language_model.load_state_dict(_part(output, "language", "language.model."))
        else:
            names = list(self.settings)
            model.load_state_dict(_part(output, names[names.index(stage) - 1], "model."))

    def _first_index(self, name: str) -> int:
        """Stages take consecutive parts of the stream."""
        first = 0
        for stage, settings in self.settings.items():
            if stage == name:
                break
            first += settings.steps * settings.batch_size
        return first

    def _processor(self) -> LlavaProcessor:
        return word_processor(
            self.source.vocabulary(),
            image_size=self.shape.image_size,
            patch_size=self.shape.patch_size,
            pixel_mean=self.shape.pixel_mean,
            pixel_std=self.shape.pixel_std,
        )

    def _export(self, output: Path) -> None:
        """Writes the finished model and its processor so that plain transformers reads them."""
        processor = self._processor()
        model = self._assemble(processor)
        model.load_state_dict(_part(output, list(self.settings)[-1], "model."))
        save(model, processor, output / "model", max_new_tokens=ANSWER_TOKENS)

    def _assemble(self, processor: LlavaProcessor) -> LlavaForConditionalGeneration:
        return assemble(
            self.shape.vision_config(),
            self.shape.text_config(len(processor.tokenizer)),
            image_token_id=processor.tokenizer.image_token_id,
        )


def _part(output: Path, stage: str, prefix: str) -> dict[str, torch.Tensor]:
    """The weights of a finished stage below a prefix.

    Raises:
        InputError: the stage has not been run.
    """
    path = output / stage / "snapshot.pt"
    if not path.exists():
        raise InputError(
            f"stage {stage!r} has not been trained: {path} is missing",
            advice="Run the whole recipe, without --only.",
        )
    state = torch.load(path, map_location="cpu", weights_only=True)["stage"]
    return {key.removeprefix(prefix): t for key, t in state.items() if key.startswith(prefix)}


def _launch(run: Run, stages: dict[str, int]) -> None:
    """Runs stages side by side in processes of their own; the first failure ends all.

    Args:
        run: whose configuration they share.
        stages: number of processes of each stage, one thread each.

    Raises:
        InputError: a stage failed; its own message is on the error stream.
    """
    started = {}
    for name, processes in stages.items():
        launcher = ["-m", "training"]
        if processes > 1:
            several = ["--standalone", "--nproc-per-node", str(processes)]
            launcher = ["-m", "torch.distributed.run", *several, *launcher]
        arguments = [*run.command, "--only", name, "--run.threads", "1"]
        started[name] = subprocess.Popen([sys.executable, *launcher, *arguments])
    try:
        for name, process in started.items():
            if code := process.wait():
                raise InputError(
                    f"stage {name!r} ended with exit code {code}",
                    advice="Its message stands above; the same command goes on from its snapshot.",
                )
    finally:
        for process in started.values():
            if process.poll() is None:
                process.terminate()
                process.wait()
