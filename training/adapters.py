"""PEFT's wrapping of a model, seen through the names of its tensors."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeGuard

from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

__all__ = ["adapter_prefixes", "bare_name", "is_peft"]


def is_peft(model: nn.Module) -> TypeGuard[PeftModel]:
    """Whether a model is wrapped by PEFT."""
    from accelerate.utils import is_peft_model

    return is_peft_model(model)


def adapter_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Beginnings of the names of all tensors that adapters have added to a model.

    Args:
        model: possibly wrapped by PEFT; without adapters there are none.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    kinds = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    return tuple(
        f"{name}.{part}."
        for name, module in model.named_modules()
        if isinstance(module, kinds)
        for part in module.adapter_layer_names
    )


def bare_name(name: str) -> str:
    """The name that a tensor has in the model without its wrapper and its layers' wrappers."""
    name = name.removeprefix("base_model.model.")
    return name.replace(".base_layer.", ".").replace(".original_module.", ".")
