"""Options that several commands share, and what they stand for: the model and the methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from mmlm.errors import InputError

if TYPE_CHECKING:
    from mmlm.cli.frame import Terminal
    from mmlm.engine.method import Method

__all__ = ["ModelOptions", "check_model_id", "method_field", "open_model", "parse_methods"]

EMBEDDED = "embedded"


@dataclass(frozen=True)
class ModelOptions:
    """The model and how it is loaded.

    Attributes:
        id: A Hugging Face id, a folder, or `embedded`: the small model that ships with mmlm.
        dtype: Number format of the weights.
        attention: Attention kernel.
        device: Where the model runs; `auto` takes the first GPU if there is one.
        chat_template: `model` uses the processor's own; `simple` is "USER: ... ASSISTANT:" for
            processors without one; anything else is the path of a Jinja file.
    """

    id: str = dataclasses.field(default=EMBEDDED, metadata={"alias": "--model"})
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    attention: Literal["sdpa", "eager"] = "sdpa"
    device: str = "auto"
    chat_template: str = "model"


def method_field() -> Any:
    """The field behind the repeatable option ``--method``; its type is ``tuple[str, ...]``."""
    return dataclasses.field(default=(), metadata={"alias": "--method"})


def parse_methods(texts: Sequence[str]) -> tuple[Method, ...]:
    """Turns ``--method`` values into methods; ``none`` stands for no method.

    Raises:
        InputError: For an unknown method or parameter, or a refused value.
    """
    import mmlm

    return tuple(mmlm.parse_method(text) for text in texts if text.strip().lower() != "none")


def check_model_id(name: str) -> None:
    """Refuses, without importing or loading anything, what cannot be a model.

    Args:
        name: ``embedded``, a folder, or a Hugging Face id.

    Raises:
        InputError: If it is a file, a folder without ``config.json``, or neither a folder nor of
            the form of a Hugging Face id.
    """
    advice = "Give a Hugging Face id (owner/name), a folder with config.json, or `embedded`."
    path = Path(name)
    if name == EMBEDDED:
        return
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise InputError(f"The folder {name!r} holds no config.json.", advice=advice)
        return
    owner, slash, repository = name.partition("/")
    if (
        path.exists()
        or path.is_absolute()
        or not (slash and owner and repository)
        or (owner.startswith((".", "~")) or "/" in repository)
    ):
        raise InputError(f"There is no model {name!r}.", advice=advice)


def open_model(
    options: ModelOptions, methods: Sequence[Method], terminal: Terminal
) -> tuple[Any, Any]:
    """Loads the model and makes sure that the methods can work on it.

    Returns:
        The model on its device, in evaluation mode, and its processor.

    Raises:
        InputError: If the model cannot be found or loaded.
        UnsupportedModel: If a method cannot work on this model.
        IncompatibleMethods: If the methods exclude each other.
    """
    check_model_id(options.id)
    import transformers

    import mmlm
    from mmlm.inputs import use_chat_template

    transformers.utils.logging.set_verbosity_error()
    if not terminal.progress:
        transformers.utils.logging.disable_progress_bar()
    try:
        model, processor = mmlm.load(
            options.id,
            dtype=options.dtype,
            attention=options.attention,
            device=_device(options.device),
        )
    except OSError as error:
        reason = str(error).strip().partition("\n")[0]
        raise InputError(
            f"The model {options.id!r} cannot be loaded: {reason}",
            advice="Check the id or folder; without network only downloaded models can be used.",
        ) from error
    use_chat_template(processor, options.chat_template)
    with mmlm.attach(model, *methods):
        pass
    return model, processor


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
