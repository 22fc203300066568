"""The model of a fine-tuning: loaded, its learning parts chosen, the others frozen."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError
from training.settings import ModelSettings

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = [
    "choose_what_learns",
    "count_parameters",
    "load_for_training",
    "refuse_half_precision",
    "whole_modules",
]


def load_for_training(settings: ModelSettings) -> tuple[PreTrainedModel, ProcessorMixin]:
    """The model on the CPU in training mode, and its processor; every weight still learns.

    (The Trainer moves it to its device; under ZeRO-3 its weights are shared out while loading.)

    Raises:
        InputError, UnsupportedModel, MissingTensors: see `mmlm.model.checkpoint.load`.
        IncompatibleMethods: methods cannot be built in, or the model has others.
    """
    from mmlm.inputs import use_chat_template
    from mmlm.model.checkpoint import load

    model, processor = load(settings.name, settings.dtype, settings.attention)
    use_chat_template(processor, settings.chat_template)
    _build_methods_in(model, processor, settings.methods)
    return model.train(), processor


def _build_methods_in(
    model: PreTrainedModel, processor: ProcessorMixin, texts: tuple[str, ...]
) -> None:
    if not texts:
        return
    from mmlm.engine.build_in import build_in, built_in
    from mmlm.engine.weights import without_file
    from mmlm.errors import IncompatibleMethods
    from mmlm.text_form import parse_method

    methods, held = tuple(map(parse_method, texts)), built_in(model)
    if not held:
        build_in(model, *methods, processor=processor)
    elif held != tuple(map(without_file, methods)):
        raise IncompatibleMethods(
            f"{', '.join(m.text for m in held)} is built into the model already; the configuration "
            f"asks for {', '.join(m.text for m in methods)}.",
            advice="Leave model.methods out, or start from a model without methods.",
        )


def choose_what_learns(model: PreTrainedModel, settings: ModelSettings) -> None:
    """Freezes everything but the parts that learn with weights of their own.

    With LoRA the language model is frozen here; its adapters come later. The head and the word
    embeddings belong to the language model.

    Raises:
        InputError: methods shall learn, and there are none with weights, or none of that name.
    """
    parts = _parts(model)
    learning = [p for p in settings.learns if not (p == "language" and settings.lora)]
    model.requires_grad_(False)
    for part in learning:
        if not parts[part]:
            raise InputError(
                f"{part!r} shall learn, but the model has no methods with weights.",
                advice="Give model.methods, such as ['CrossLMM()'], or leave it out of `learns`.",
            )
        for module in _chosen(parts, part, settings):
            module.requires_grad_(True)


def _chosen(parts: dict[str, list[Any]], part: str, settings: ModelSettings) -> list[Any]:
    """The modules of a part that learn.

    Raises:
        InputError: no module has a name in `method_parts`.
    """
    if part != "methods" or not settings.method_parts:
        return parts[part]
    named = {
        f"{name}.{inner}" if inner else name: module
        for name, whole in zip(parts["names"], parts[part], strict=True)
        for inner, module in whole.named_modules()
    }
    unknown = [name for name in settings.method_parts if name not in named]
    if unknown:
        short = [name for name in named if name.count(".") < 2]
        raise InputError(
            f"method_parts names {', '.join(unknown)}, which no method has.",
            advice=f"There are {', '.join(short)} and what lies below them.",
        )
    return [named[name] for name in settings.method_parts]


def whole_modules(model: PreTrainedModel, settings: ModelSettings) -> tuple[str, ...]:
    """Names of the modules that learn as a whole beside adapters (PEFT's `modules_to_save`)."""
    wanted = [part for part in settings.learns if part != "language"]
    names = {id(module): name for name, module in model.named_modules()}
    parts = _parts(model)
    return tuple(names[id(m)] for part in wanted for m in _chosen(parts, part, settings))


def count_parameters(model: Any) -> tuple[int, int]:
    """How many parameters learn, and how many there are (also if ZeRO-3 has shared them out)."""

    def size(parameter: Any) -> int:
        return int(getattr(parameter, "ds_numel", parameter.numel()))

    sizes = [(size(p), p.requires_grad) for p in model.parameters()]
    learning = sum(n for n, learns in sizes if learns)
    if not learning:
        raise InputError("No parameter learns.", advice="Check `learns` and `lora`.")
    return learning, sum(n for n, _ in sizes)


def refuse_half_precision(model: Any, *, master_weights: bool) -> None:
    """Refuses weights that learn in float16 by themselves.

    Adam divides by the root of a mean square + 1e-8, which is 0 in float16: the first steps throw
    the weights far away. (Adapters are float32 beside float16 weights that are frozen.)

    Args:
        model: what is trained.
        master_weights: DeepSpeed learns on float32 copies.

    Raises:
        InputError: such weights learn; says which.
    """
    import torch

    half = [
        name for name, p in model.named_parameters() if p.requires_grad and p.dtype is torch.float16
    ]
    if half and not master_weights:
        raise InputError(
            f"{len(half)} tensors learn in float16, such as {half[0]!r}: Adam would destroy them.",
            advice="Set model.dtype: float32 (run.precision: bf16 computes in bfloat16 all the "
            "same).",
        )


def _parts(model: PreTrainedModel) -> dict[str, list[Any]]:
    from mmlm.engine.anatomy import Anatomy
    from mmlm.engine.method import MODULES

    anatomy = Anatomy(model)
    methods = getattr(model, MODULES, {})
    return {
        "names": list(methods),
        "methods": list(methods.values()),
        "language": [anatomy.text, anatomy.head],
        "projector": [anatomy.projector],
        "tower": [anatomy.tower],
    }
