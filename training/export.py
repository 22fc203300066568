"""From a trained model in memory, or a checkpoint, to a folder that others can load.

``adapter``: PEFT's folder. ``merged``: the whole model with the adapter folded in. ``model``: the
whole model that was trained without an adapter. The last two are what plain transformers reads.
Methods that are built into the model stay with it (:mod:`mmlm.model.stored_methods`).
"""

from __future__ import annotations

import copy
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor, nn

from mmlm.engine.anatomy import unwrap
from mmlm.errors import InputError, MissingTensors
from mmlm.model.checkpoint import save
from mmlm.model.stored_methods import parted, store_methods
from training.adapters import adapter_prefixes, is_peft
from training.gather import gathered_state, on_main, without_zero3
from training.model_card import ModelCard

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import ProcessorMixin

__all__ = ["What", "check_complete", "export", "method_tensors"]

What: TypeAlias = Literal["adapter", "merged", "model"]
_WRAPPER = "base_model.model."


def export(
    model: nn.Module,
    processor: ProcessorMixin,
    folder: Path,
    what: What,
    card: ModelCard | None = None,
    *,
    adapter: str = "default",
    replace: bool = False,
) -> None:
    """Writes a trained model as a folder; the model in memory is left as it is.

    The folder appears whole or not at all. With several processes all must call it; under ZeRO-3
    the weights are gathered one by one to the first, which writes.

    Args:
        model: not wrapped by DeepSpeed or DDP (``trainer.model``), possibly by PEFT.
        processor: with tokenizer and chat template.
        folder: of the export.
        what: "adapter" (with PEFT only), "merged" (with PEFT only), or "model" (without).
        card: for the README.md.
        adapter: which adapter, by PEFT's name.
        replace: whether an existing folder is replaced.

    Raises:
        InputError: the folder exists, or ``what`` does not fit the model.
        MissingTensors: what was written would not fill the model; nothing is left behind.
    """
    _check_request(model, folder, what, adapter, replace)
    scratch = folder.with_name(f".{folder.name}.part")
    on_main(lambda: _emptied(scratch))
    text = (card or ModelCard()).text(folder.name, what)
    if what == "adapter":
        prefixes = adapter_prefixes(model)
        state = gathered_state(model, lambda name: name.startswith(prefixes) or _of_method(name))
        on_main(lambda: _write_adapter(model, processor, scratch, state, adapter))
    else:
        state = gathered_state(model)
        on_main(lambda: _write_model(model, processor, scratch, state, adapter))
    on_main(lambda: _publish(scratch, folder, text))


def _check_request(model: nn.Module, folder: Path, what: What, adapter: str, replace: bool) -> None:
    wrapped = is_peft(model)
    if wrapped != (what != "model"):
        kinds = "adapter or merged" if wrapped else "model"
        has = "has an adapter" if wrapped else "has no adapter"
        raise InputError(f"{what!r} does not fit a model that {has}", advice=f"Export {kinds}.")
    if wrapped and adapter not in model.peft_config:
        raise InputError(
            f"there is no adapter {adapter!r}; there are {', '.join(model.peft_config)}",
            advice="Give the name of one of them.",
        )
    if what == "adapter":
        prefixes = adapter_prefixes(model)
        lost = [
            name
            for name, parameter in model.named_parameters()
            if parameter.requires_grad and not name.startswith(prefixes) and not _of_method(name)
        ]
        if lost:
            raise InputError(
                f"{len(lost)} trained parameters are no part of the adapter "
                f"({', '.join(lost[:3])} ...) and would be lost",
                advice="Export merged, or name their modules in modules_to_save.",
            )
    if unwrap(model).config.to_dict().get("quantization_config") and what != "adapter":
        raise InputError(
            "the base model is quantised; folding an adapter into it would round its weights",
            advice="Export the adapter, and merge it with: mmlm export ADAPTER --dtype bfloat16.",
        )
    taken = on_main(lambda: folder.exists() and (folder.is_file() or any(folder.iterdir())))
    if taken and not replace:
        raise InputError(f"{str(folder)!r} exists already", advice="Choose another folder.")


def _of_method(name: str) -> bool:
    """Whether a tensor belongs to a method that is built into the model."""
    return bool(parted({name.removeprefix(_WRAPPER): None})[1])


def method_tensors(
    state: Mapping[str, Tensor], adapter: str, *, learned: bool
) -> dict[str, Tensor]:
    """Tensors of built-in methods by the names they have in a bare model.

    Args:
        state: of the wrapped model.
        adapter: beside which methods may have learned.
        learned: such tensors as they are now; else as they were before.
    """
    mark, own = f".modules_to_save.{adapter}.", {}
    for name, tensor in state.items():
        if not _of_method(name):
            continue
        bare = name.removeprefix(_WRAPPER)
        if ".modules_to_save." not in bare:
            own.setdefault(bare.replace(".original_module.", "."), tensor)
        elif learned and mark in bare:
            own[bare.replace(mark, ".")] = tensor
    return own


def _emptied(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)


def _publish(scratch: Path, folder: Path, card: str) -> None:
    (scratch / "README.md").write_text(card, encoding="utf-8")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    scratch.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def _write_adapter(
    model: PeftModel,
    processor: ProcessorMixin,
    folder: Path,
    state: dict[str, Tensor],
    adapter: str,
) -> None:
    from peft import get_peft_model_state_dict
    from safetensors import safe_open

    # Methods that learn beside the adapter are part of it; here they stand as they were before.
    own = method_tensors(state, adapter, learned=False)
    prefixes = adapter_prefixes(model)
    model.save_pretrained(
        folder,
        state_dict={
            name: tensor
            for name, tensor in state.items()
            if not _of_method(name) or name.startswith(prefixes)
        },
        selected_adapters=[adapter],
        # The embeddings do not learn; "auto" would look for the base model on the hub.
        save_embedding_layers=False,
    )
    # PEFT puts any adapter but "default" into a folder of that name.
    if adapter != "default":
        for path in (folder / adapter).iterdir():
            path.rename(folder / path.name)
        (folder / adapter).rmdir()
    processor.save_pretrained(folder)
    store_methods(unwrap(model), folder, parted(own)[1])
    expected = get_peft_model_state_dict(
        model, state_dict=state, adapter_name=adapter, save_embedding_layers=False
    )
    with safe_open(folder / "adapter_model.safetensors", "pt") as stored:
        written = set(stored.keys())
    if not written or written != set(expected):
        raise MissingTensors(
            f"the adapter has {len(expected)} tensors, {len(written)} were written",
            advice="Report this with the versions of peft and transformers.",
        )


def _write_model(
    model: nn.Module,
    processor: ProcessorMixin,
    folder: Path,
    state: dict[str, Tensor],
    adapter: str,
) -> None:
    with without_zero3():
        tensors = _merged(model, state, adapter) if is_peft(model) else state
        save(unwrap(model), processor, folder, tensors=tensors)
        check_complete(folder)


def _merged(model: PeftModel, state: Mapping[str, Tensor], adapter: str) -> dict[str, Tensor]:
    """The state dictionary of the bare model with an adapter folded in, on the CPU.

    PEFT folds on a second model without weights of its own, which is given the tensors: the one
    in memory may be divided among processes, and unmerging would round its weights.
    """
    from peft import LoraConfig, get_peft_model

    base = unwrap(model)
    own = {n: x.cpu() for n, x in method_tensors(state, adapter, learned=True).items()}
    marks = [f".{name}" for name in model.peft_config if name != adapter]
    prefixes = adapter_prefixes(model)
    weights = {
        name: tensor.cpu()
        for name, tensor in state.items()
        if not _of_method(name)
        and not (name.startswith(prefixes) and any(mark in name for mark in marks))
    }
    config = copy.deepcopy(model.peft_config[adapter])
    if config.modules_to_save:
        config.modules_to_save = [n for n in config.modules_to_save if not _of_method(f"{n}.")]
    if isinstance(config, LoraConfig):
        # Nothing is drawn or decomposed: every tensor is replaced by the trained one.
        config.init_lora_weights = False
    with torch.device("meta"):
        bare = type(base)(base.config)
        skeleton = get_peft_model(bare, config, adapter_name=adapter)
    skeleton.load_state_dict(weights, assign=True)
    merged = skeleton.merge_and_unload(safe_merge=True, adapter_names=[adapter])
    return {**merged.state_dict(), **own}


def check_complete(folder: Path) -> None:
    """Makes sure that plain transformers finds every weight of an exported model.

    Several families are stored under other names than those in memory; where the library does not
    know how to get back, it would load random weights and only log it. The model is built without
    memory for its weights, so that this costs seconds for any size.

    Args:
        folder: of the export.

    Raises:
        MissingTensors: weights are missing, superfluous or of another shape; names them.
    """
    from transformers import AutoModelForImageTextToText

    _, info = AutoModelForImageTextToText.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True
    )
    flaws = {
        kind.replace("_keys", ""): sorted(map(str, info[kind]))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
        if info[kind]
    }
    if flaws:
        raise MissingTensors(
            "the exported model would not load: "
            + "; ".join(f"{kind} {', '.join(names[:5])}" for kind, names in flaws.items()),
            advice="Report this with the model's class and the version of transformers.",
        )
