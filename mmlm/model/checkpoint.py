"""Loading and saving models together with their processors, and the methods built into them.

`load` is how every part of the project gets a model: the embedded one, a folder, or an id of the
Hugging Face hub. It refuses a checkpoint that does not fill the model exactly, because the library
itself would go on with random weights and say so only in a log line.

Methods that are built into a model (:func:`mmlm.build_in`) are stored beside its checkpoint, their
text forms in ``methods.yaml`` and their weights in ``methods.safetensors``. Everything else in the
folder is what plain transformers writes and reads.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, UnsupportedModel, raise_for
from mmlm.model.stored_methods import MODULES, parted, restore_methods, store_methods

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = [
    "ATTENTION",
    "DTYPES",
    "EMBEDDED",
    "embedded_folder",
    "load",
    "refuse_unfilled",
    "save",
    "skeleton",
]

EMBEDDED = "embedded"
"""Name of the model that is part of the package."""
DTYPES = ("float32", "bfloat16", "float16", "auto")
ATTENTION = ("sdpa", "eager", "flash_attention_2", "flex_attention")


def embedded_folder() -> Path:
    """Where the embedded model's files are."""
    return Path(__file__).resolve().parent.parent / "assets"


def load(
    name: str | Path = EMBEDDED,
    dtype: str = "float32",
    attention: str = "sdpa",
    device: str | torch.device = "cpu",
) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Loads a vision-language model and its processor, ready to generate.

    Args:
        name: "embedded", a folder with a checkpoint, or an id on the Hugging Face hub.
        dtype: precision of the weights in memory: "float32", "bfloat16", "float16", or "auto"
            for the one they are stored in.
        attention: the library's attention implementation, "sdpa" or "eager" on any machine.
        device: where the model is put, "cpu", "cuda", "cuda:1" ...

    Returns:
        The model in evaluation mode, with the methods built in that are stored beside it, and its
        processor, which pads on the left.

    Raises:
        InputError: no such folder or id, not a complete checkpoint, or an unknown option.
        UnsupportedModel: a model that does not turn images and text into text.
        MissingTensors: tensors are missing, superfluous or of another shape; names are listed.
    """
    from mmlm.engine.branches.template import remember_processor

    if dtype not in DTYPES:
        raise InputError(f"dtype {dtype!r} is unknown", advice=f"Take one of {', '.join(DTYPES)}.")
    if attention not in ATTENTION:
        raise InputError(
            f"attention {attention!r} is unknown", advice=f"Take one of {', '.join(ATTENTION)}."
        )
    source = _source(name)
    config = _config(source)
    model = _model(source, config, dtype, attention).to(device).eval()
    processor = _processor(source)
    restore_methods(model, processor, source)
    tokenizer = processor.tokenizer
    tokenizer.padding_side = "left"
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    if model.generation_config.pad_token_id is None:
        model.generation_config.pad_token_id = tokenizer.pad_token_id
    remember_processor(model, processor)
    return model, processor


def skeleton(name: str | Path = EMBEDDED) -> tuple[PreTrainedModel, ProcessorMixin]:
    """Builds a model without weights, to look at its parts; reads only the small files.

    Args:
        name: as for `load`.

    Returns:
        The model, its parameters on the "meta" device, and its processor.

    Raises:
        InputError: no such folder or id, or no processor.
        UnsupportedModel: a model that does not turn images and text into text.
    """
    import torch
    from transformers import AutoModelForImageTextToText

    source = _source(name)
    config = _config(source)
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    return model.eval(), _processor(source)


def save(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_new_tokens: int | None = None,
    tensors: dict[str, torch.Tensor] | None = None,
) -> None:
    """Writes a model and its processor as a folder that plain transformers reads.

    Args:
        model: in memory, with the methods built into it; it is left as it is.
        processor: with tokenizer and chat template.
        folder: made if missing; files of the same names are replaced.
        dtype: precision of the stored weights, None as in memory.
        max_new_tokens: default length of an answer, written into the generation settings.
        tensors: state dictionary to write in place of the model's own: gathered from several
            processes, or with adapters folded in.
    """
    from transformers import GenerationConfig

    tokenizer = processor.tokenizer
    # Several ends (a chat model's end of turn and of text) are known to the model only.
    ends = model.generation_config.eos_token_id
    settings = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if isinstance(ends, list) else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        max_new_tokens=max_new_tokens,
        do_sample=False,
    )
    weights, own = parted(model.state_dict() if tensors is None else tensors)
    stored = model
    if dtype is not None:
        stored = type(model)(model.config).to(dtype)
        stored.load_state_dict(weights)
        weights = stored.state_dict()
        own = {name: tensor.to(dtype) for name, tensor in own.items()}
    former, stored.generation_config = stored.generation_config, settings
    try:
        whole = tensors is None and not own
        stored.save_pretrained(folder, **({} if whole else {"state_dict": weights}))
        processor.save_pretrained(folder)
    finally:
        stored.generation_config = former
    store_methods(model, Path(folder), own)


def _source(name: str | Path) -> str:
    """A folder's path, or the id as it was given."""
    if str(name) == EMBEDDED:
        if not (embedded_folder() / "config.json").exists():
            raise InputError(
                f"the embedded model is missing from {embedded_folder()}",
                advice="Install the package with its data files, or make it: make embedded-model.",
            )
        return str(embedded_folder())
    folder = Path(name).expanduser()
    if str(name) and folder.is_dir():
        if not (folder / "config.json").exists():
            raise InputError(
                f"{folder} is not a checkpoint: it has no config.json",
                advice="Give the folder that save_pretrained wrote.",
            )
        return str(folder)
    text = str(name)
    looks_like_path = isinstance(name, Path) or text.startswith((".", "/", "~"))
    if looks_like_path or text.count("/") > 1 or not text:
        raise InputError(
            f"there is no folder {text!r}",
            advice="Give an existing folder, an id like owner/name, or 'embedded'.",
        )
    return text


def _config(source: str) -> Any:
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING

    try:
        config = AutoConfig.from_pretrained(source)
    except OSError as error:
        raise InputError(
            f"no model {source!r}: it is not a folder here, not in the local cache, and the hub "
            "does not have it or cannot be reached",
            advice="Check the id, download it once while online, or use --model embedded.",
        ) from error
    except ValueError as error:  # a model_type that this version does not know
        raise UnsupportedModel(
            f"{source!r} has an architecture unknown to this version of transformers: "
            f"{str(error).splitlines()[0]}",
            advice="Upgrade transformers, or choose another model.",
        ) from error
    if type(config) not in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING:
        raise UnsupportedModel(
            f"{source!r} is a {config.model_type!r} model, which does not turn images and text "
            "into text",
            advice="Choose a vision-language model such as LLaVA, Qwen2.5-VL or InternVL.",
        )
    return config


def _model(source: str, config: Any, dtype: str, attention: str) -> PreTrainedModel:
    import torch
    from transformers import AutoModelForImageTextToText

    try:
        model, info = AutoModelForImageTextToText.from_pretrained(
            source,
            config=config,
            dtype=dtype if dtype == "auto" else getattr(torch, dtype),
            attn_implementation=attention,
            output_loading_info=True,
            # Reported below, with all names, instead of an exception at the first one.
            ignore_mismatched_sizes=True,
        )
    except OSError as error:
        raise InputError(
            f"the weights of {source!r} cannot be read: {str(error).splitlines()[0]}",
            advice="The checkpoint is incomplete; download or copy it again.",
        ) from error
    except ImportError as error:
        raise InputError(
            f"attention {attention!r} is not installed: {str(error).splitlines()[0]}",
            advice="Use attention sdpa (--model.attention sdpa).",
        ) from error
    _check(source, info)
    return model


def _check(source: str, info: dict[str, Any]) -> None:
    """Raises if the checkpoint does not fill the model exactly."""
    mismatched = [key if isinstance(key, str) else str(key[0]) for key in info["mismatched_keys"]]
    kinds = {
        "missing": sorted(set(info["missing_keys"]) - set(mismatched)),
        "unexpected": sorted(info["unexpected_keys"]),
        "of another shape": sorted(mismatched),
    }
    advice = "The files do not belong together or are incomplete; save or download again."
    if any(name.startswith(f"{MODULES}.") for name in kinds["unexpected"]):
        advice = "save_pretrained wrote it; mmlm.model.checkpoint.save stores methods apart."
    raise_for(kinds, f"the checkpoint {source!r} does not fit its model", advice)


def refuse_unfilled(name: str, model: PreTrainedModel, info: dict[str, Any], advice: str) -> None:
    """Refuses a part of a model whose checkpoint left some of its weights random.

    Args:
        name: of the checkpoint.
        model: that was loaded from it.
        info: what `from_pretrained(..., output_loading_info=True)` says.
        advice: what to do.

    Raises:
        MissingTensors: names what is missing or of another shape.
    """
    kinds = {
        "missing": sorted(info["missing_keys"]),
        "of another shape": sorted(map(str, info["mismatched_keys"])),
    }
    raise_for(kinds, f"the checkpoint {name!r} does not fill a {type(model).__name__}", advice)


def _processor(source: str) -> ProcessorMixin:
    from transformers import AutoProcessor, ProcessorMixin

    try:
        processor = AutoProcessor.from_pretrained(source)
    except (OSError, ValueError) as error:
        raise InputError(
            f"{source!r} has no processor that can be read: {str(error).splitlines()[0]}",
            advice="Save the processor beside the model with processor.save_pretrained.",
        ) from error
    if not isinstance(processor, ProcessorMixin):
        raise InputError(
            f"{source!r} has a {type(processor).__name__} but no processor for images and text",
            advice="Save the processor beside the model with processor.save_pretrained.",
        )
    return processor
