"""Weights of methods: made afresh, stored in a file of their own, and read back.

A method with weights declares them in :meth:`mmlm.engine.method.Method.modules`. They become part
of the model by :func:`mmlm.engine.build_in.build_in`, to be trained and stored with it, or are lent
to one ``attach`` block, with what a file holds. Such a file is a safetensors file with the method's
text form beside the tensors; it can be shared without the model that it was trained for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmlm.engine.anatomy import Anatomy, unwrap
from mmlm.engine.method import MODULES, Method
from mmlm.errors import IncompatibleMethods, InputError, raise_for

__all__ = [
    "WEIGHTS",
    "fill",
    "lent",
    "make",
    "misfits",
    "store",
    "untrained",
    "without_file",
    "worn",
    "write",
]

#: The field of a method that names the file with its weights.
WEIGHTS = "weights_file"
#: Fresh weights do not depend on what was drawn before them.
_SEED = 0


def make(anatomy: Anatomy, methods: Sequence[Method]) -> dict[str, nn.Module]:
    """Weights of methods by the name of their class, on the device of the model's head.

    Numbers come in the model's precision, but for modules with a true attribute ``keep_fp32``.
    Where a method names a file, its tensors are read into them; else they are fresh and always the
    same.

    Raises:
        IncompatibleMethods: If two methods would bring weights of one name.
        InputError: If a file cannot be read.
        MissingTensors: If its tensors are not exactly those of the method.
    """
    modules: dict[str, nn.Module] = {}
    weight: Any = anatomy.head.weight
    for method in methods:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(_SEED)
            module = method.modules(anatomy)
        if module is None:
            continue
        name = type(method).__name__
        if name in modules:
            raise IncompatibleMethods(
                f"Two methods {name} bring weights, which would have the same names.",
                advice="Use one of them.",
            )
        if file := getattr(method, WEIGHTS, ""):
            fill(module, file, method)
        modules[name] = _placed(module, weight.device, weight.dtype)
    return modules


def lent(
    anatomy: Anatomy, methods: Sequence[Method], built: Sequence[Method]
) -> dict[str, nn.Module]:
    """Weights for one block, of methods that are not built into the model.

    Raises:
        IncompatibleMethods: If fresh weights of a method mean nothing and it names no file.
    """
    others = [method for method in methods if method not in built]
    for method in others:
        if missing := untrained(anatomy, method):
            raise IncompatibleMethods(
                f"{method.label} {missing}.",
                advice=f"Give {type(method).__name__}(weights_file='...', ...), or train it: "
                "build_in(model, ...) makes its weights part of the model.",
            )
    modules = make(anatomy, others)
    for module in modules.values():
        module.requires_grad_(False).eval()
    return modules


def untrained(anatomy: Anatomy, method: Method) -> str:
    """Why a method cannot be attached yet: nobody trained its weights. Empty if it can.

    Nothing is allocated for it: weights may be large.
    """
    file: str = getattr(method, WEIGHTS, "")
    if method.fresh_is_valid or file:
        return ""
    with torch.device("meta"):
        none = method.modules(anatomy) is None
    return "" if none else "has weights that must be trained first"


def without_file(method: Method) -> Method:
    """The method without the name of its file, once its weights are part of a model."""
    if getattr(method, WEIGHTS, ""):
        return dataclasses.replace(method, **{WEIGHTS: ""})
    return method


def worn(module: Any) -> nn.Module:
    """The module that counts: PEFT wraps what learns beside adapters, and keeps the original."""
    learning = getattr(module, "modules_to_save", None)
    if learning is None or not hasattr(module, "original_module"):
        return module
    active = [] if module.disable_adapters else [n for n in module.active_adapters if n in learning]
    return learning[active[0]] if active else module.original_module


def store(model: nn.Module, name: str, path: str | Path) -> None:
    """Writes the weights of one built-in method into a file of their own.

    Args:
        model: A model with the method built in.
        name: The method's class, e.g. ``"DyVTE"``.
        path: A ``.safetensors`` file; a file that is there is replaced.

    Raises:
        InputError: If no method of this name with weights is built in.
    """
    from mmlm.engine.build_in import built_in

    modules = getattr(unwrap(model), MODULES, {})
    if name not in modules:
        raise InputError(
            f"No weights of {name!r} are part of this model; there are: "
            f"{', '.join(modules) or 'none'}",
            advice="build_in(model, ...) makes them one.",
        )
    text = next(m.text for m in built_in(model) if type(m).__name__ == name)
    write(worn(modules[name]).state_dict(), text, Path(path))


def write(tensors: Mapping[str, Tensor], text: str, path: Path) -> None:
    """Writes a file of weights, whole or not at all.

    Args:
        tensors: By their names in the method's module.
        text: The method's text form.
        path: The file.
    """
    from safetensors.torch import save_file

    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    own = {name: x.detach().cpu().contiguous() for name, x in tensors.items()}
    save_file(own, part, metadata={"format": "pt", "method": text})
    part.replace(path)


def fill(module: nn.Module, file: str | Path, method: Method) -> None:
    """Reads a file into a method's weights; every name and shape must agree.

    Raises:
        InputError: If the file cannot be read, or belongs to another method.
        MissingTensors: If tensors are missing, unexpected or of another shape.
        ValueError: What the method itself says about tensors of another shape.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), "pt") as opened:
            text = (opened.metadata() or {}).get("method", "")
            _refuse_others(text, file, method)
            shapes = {n: tuple(opened.get_slice(n).get_shape()) for n in opened.keys()}
            wanted = method.read_from(shapes, module)
            tensors = {name: opened.get_tensor(name) for name in wanted}
    except (OSError, SafetensorError) as error:
        raise InputError(
            f"The weights {str(file)!r} of {type(method).__name__} cannot be read: {error}",
            advice="Give the path of a file that mmlm.engine.weights.store wrote.",
        ) from error
    method.check_weights(text)
    made = f" (made by {text})" if text else ""
    raise_for(
        misfits(module.state_dict(), tensors),
        f"the weights {str(file)!r}{made} do not fit {method.text}",
        "Use the settings and the kind of model that the weights were trained with.",
    )
    module.load_state_dict(tensors)


def misfits(own: Mapping[str, Tensor], given: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names of tensors that are missing, unexpected, or of another shape; for `raise_for`.

    Args:
        own: Those that are there to be filled.
        given: What they shall be filled with.
    """
    return {
        "missing": sorted(own.keys() - given.keys()),
        "unexpected": sorted(given.keys() - own.keys()),
        "of another shape": [
            f"{n} {tuple(given[n].shape)} instead of {tuple(own[n].shape)}"
            for n in sorted(own.keys() & given.keys())
            if own[n].shape != given[n].shape
        ],
    }


def _refuse_others(text: str, file: str | Path, method: Method) -> None:
    """Refuses the weights of another method, whose text form stands in the file."""
    name = type(method).__name__
    if text and text.partition("(")[0].rpartition(".")[2] != name:
        raise InputError(
            f"{str(file)!r} holds the weights of {text}, not of {name}",
            advice="Give a file of this method.",
        )


def _placed(module: nn.Module, device: torch.device, dtype: torch.dtype) -> nn.Module:
    """The module on a device, its numbers in a precision unless a part keeps fp32."""
    keeping = {
        id(p)
        for part in module.modules()
        if getattr(part, "keep_fp32", False)
        for p in part.parameters()
    }

    def convert(x: torch.Tensor) -> torch.Tensor:
        kept = id(x) in keeping or not x.is_floating_point()
        return x.to(device) if kept else x.to(device, dtype)

    return module._apply(convert)
