"""Stored checkpoints as models in memory: adapters on their base, whole models, ZeRO-3's shards."""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, MissingTensors
from mmlm.model.stored_methods import METHODS_FILE
from mmlm.records import INFORMATION
from training.checkpoints import MARKER, RUN_RECORD, complete_checkpoints
from training.model_card import ModelCard

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = ["StoredCheckpoint", "find_checkpoint"]

_ADAPTER = "adapter_config.json"
_STATE = "trainer_state.json"
_WEIGHTS = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin")
_PROCESSOR = ("processor_config.json", "preprocessor_config.json")


@dataclass(frozen=True)
class StoredCheckpoint:
    """One folder with trained weights.

    Attributes:
        folder: of the weights.
        run: folder of the run it belongs to, None if it stands alone.
    """

    folder: Path
    run: Path | None

    @property
    def is_adapter(self) -> bool:
        """Whether only an adapter is stored."""
        return (self.folder / _ADAPTER).exists()

    def base(self) -> str:
        """The base model that an adapter names."""
        config = json.loads((self.folder / _ADAPTER).read_text("utf-8"))
        return str(config.get("base_model_name_or_path") or "")

    def card(self, base: str = "") -> ModelCard:
        """What is known about the training: its configuration and its last numbers.

        Args:
            base: the base model, where the user names it.
        """
        record = {}
        if self.run is not None:
            record = json.loads((self.run / RUN_RECORD).read_text("utf-8"))
        information = record.pop(INFORMATION, {})
        named = self.base() if self.is_adapter else ""
        arguments = record.get("recipe", {}).get("init_args", {})
        if isinstance(arguments.get("model"), dict):
            named = arguments["model"].get("name", named)
        return ModelCard(
            base_model=base or named,
            configuration=record,
            data=information.get("data", {}),
            numbers=self._numbers(),
            revision=information.get("revision", ""),
            command=" ".join(information.get("command", ())),
        )

    def _numbers(self) -> dict[str, float]:
        """The last value of everything that was logged."""
        path = self.folder / _STATE
        history = json.loads(path.read_text("utf-8"))["log_history"] if path.exists() else []
        return {
            name: float(value)
            for entry in history
            for name, value in entry.items()
            if isinstance(value, (int, float))
        }

    def load(self, base: str = "", dtype: str = "auto") -> tuple[nn.Module, ProcessorMixin]:
        """The model and its processor.

        Args:
            base: base model of an adapter; default: the one that it names.
            dtype: see `mmlm.model.checkpoint.load`.

        Returns:
            A ``PeftModel`` for an adapter, else the bare model; and the processor.

        Raises:
            InputError: there is no base model, or no weights.
            MissingTensors: weights are missing or superfluous; names them.
        """
        from mmlm.model.checkpoint import load

        if self.is_adapter:
            return self._with_adapter(base or self.base(), dtype)
        if base:
            raise InputError(
                f"{str(self.folder)!r} is a whole model, it has no base", advice="Leave --base out."
            )
        if any((self.folder / name).exists() for name in _WEIGHTS):
            return load(self.folder, dtype=dtype)
        if (self.folder / "latest").exists():
            return self._from_shards(dtype)
        raise InputError(
            f"{str(self.folder)!r} holds no weights",
            advice="Give a run's folder, one of its checkpoints, or a folder with an adapter.",
        )

    def _with_adapter(self, base: str, dtype: str) -> tuple[nn.Module, ProcessorMixin]:
        from peft import PeftModel, get_peft_model_state_dict
        from safetensors import safe_open

        from mmlm.engine.build_in import built_in, take_out
        from mmlm.errors import raise_for
        from mmlm.model.checkpoint import load
        from mmlm.model.stored_methods import restore_methods

        if not base:
            raise InputError(
                f"the adapter in {str(self.folder)!r} does not name its base model",
                advice="Give it with --base.",
            )
        model, processor = load(base, dtype=dtype)
        processor = self._own_processor() or processor
        if (self.folder / METHODS_FILE).exists():
            if built_in(model):
                take_out(model)
            restore_methods(model, processor, str(self.folder))
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "Found missing adapter keys")  # raised below
                adapted = PeftModel.from_pretrained(
                    model, self.folder, autocast_adapter_dtype=False
                )
        except (RuntimeError, ValueError) as error:  # tensors of another shape, layers of no name
            raise MissingTensors(
                f"the adapter in {str(self.folder)!r} does not fit {base!r}: {error}",
                advice="Give the model it was trained on with --base.",
            ) from error
        expected = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        with safe_open(self.folder / "adapter_model.safetensors", "pt") as file:
            stored = set(file.keys())
        raise_for(
            {"missing": sorted(expected - stored), "unexpected": sorted(stored - expected)},
            f"the adapter in {str(self.folder)!r} does not fit {base!r}",
        )
        return adapted, processor

    def _own_processor(self) -> Any:
        from transformers import AutoProcessor

        if any((self.folder / name).exists() for name in _PROCESSOR):
            return AutoProcessor.from_pretrained(self.folder)
        return None

    def _from_shards(self, dtype: str) -> tuple[PreTrainedModel, ProcessorMixin]:
        """A whole model from the parts that the processes of ZeRO wrote."""
        import torch
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
        from transformers import AutoConfig, AutoModelForImageTextToText

        processor = self._own_processor()
        if processor is None:
            raise InputError(
                f"{str(self.folder)!r} has no processor", advice="Copy it there and try again."
            )
        config = AutoConfig.from_pretrained(self.folder)
        kind = config.dtype if dtype == "auto" else getattr(torch, dtype)
        model = AutoModelForImageTextToText.from_config(config, dtype=kind).eval()
        found = model.load_state_dict(
            get_fp32_state_dict_from_zero_checkpoint(str(self.folder)), strict=False
        )
        model.tie_weights()
        tied = set(model.all_tied_weights_keys)
        flaws = sorted({*found.missing_keys} - tied) + sorted(found.unexpected_keys)
        if flaws:
            raise MissingTensors(
                f"the shards in {str(self.folder)!r} do not fill the model: {', '.join(flaws[:5])}",
                advice="Methods that are built in cannot be restored from shards; run the training "
                "to its end and take its own export.",
            )
        return model, processor


def find_checkpoint(path: Path) -> StoredCheckpoint:
    """What a user means by a folder: a run (its best or last checkpoint), or weights.

    Raises:
        InputError: there is no such folder, or no complete checkpoint in it.
    """
    if not path.is_dir():
        raise InputError(f"There is no folder {str(path)!r}.", advice="Check the path.")
    if (path / RUN_RECORD).exists():
        return StoredCheckpoint(_best(path), path)
    parent = path.resolve().parent
    if (parent / RUN_RECORD).exists() and path.resolve().name.startswith("checkpoint-"):
        if not (path / MARKER).exists():
            raise InputError(
                f"{str(path)!r} is not complete: the run was cut off while it was written",
                advice=f"Give the run's folder {str(parent)!r} for its last complete checkpoint.",
            )
        return StoredCheckpoint(path, parent)
    return StoredCheckpoint(path, None)


def _best(run: Path) -> Path:
    """The checkpoint that a run would end with now."""
    complete = complete_checkpoints(run)
    if not complete:
        raise InputError(
            f"{str(run)!r} has no complete checkpoint yet",
            advice="Wait for the first one, or start the run again if it was cut off.",
        )
    state = json.loads((complete[-1] / _STATE).read_text("utf-8"))
    best = Path(state["best_model_checkpoint"] or "").name
    return next((path for path in complete if path.name == best), complete[-1])
