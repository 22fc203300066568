"""Options that several commands share, and what they stand for: the model and the methods."""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from mmlm.cli.frame import closest
from mmlm.errors import InputError
from mmlm.progress import library_bars

if TYPE_CHECKING:
    from mmlm.cli.frame import Terminal
    from mmlm.engine.method import Method

__all__ = [
    "EMBEDDED",
    "ModelOptions",
    "check_model_name",
    "method_field",
    "open_model",
    "parse_methods",
]

EMBEDDED = "embedded"
_PROXIES = {"HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"}


@dataclass(frozen=True)
class ModelOptions:
    """The model and how it is loaded.

    Attributes:
        id: A Hugging Face id, a folder, or `embedded`: the small model that ships with mmlm.
        dtype: Number format of the weights; `auto` is the one they are stored in.
        attention: Attention kernel.
        device: Where the model runs; `auto` takes the first GPU if there is one.
        chat_template: `model` uses the processor's own; `simple` is "USER: ... ASSISTANT:" for
            processors without one; anything else is the path of a Jinja file.
    """

    id: str = dataclasses.field(default=EMBEDDED, metadata={"alias": "--model"})
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32"
    attention: Literal["sdpa", "eager", "flash_attention_2"] = "sdpa"
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


def check_model_name(name: str) -> None:
    """Refuses at once, without importing or asking anything, what cannot be a model.

    Also spares users without a network half a minute: the hub's client would try again and again
    before it looks at what was downloaded earlier.

    Args:
        name: ``embedded``, a folder, or a Hugging Face id.

    Raises:
        InputError: If it is a plain word that is no folder.
    """
    if name == EMBEDDED or Path(name).expanduser().is_dir():
        return
    if "/" not in name:
        raise InputError(
            f"There is no model {name!r}: it is no folder, and a Hugging Face id has the form "
            "owner/name.",
            advice=closest(name, [EMBEDDED]) or "The model that ships with mmlm is `embedded`.",
        )
    if not _PROXIES & os.environ.keys() and "HF_HUB_OFFLINE" not in os.environ:
        endpoint = os.environ.get("HF_ENDPOINT", "https://huggingface.co")
        try:
            socket.getaddrinfo(urlsplit(endpoint).hostname, 443)
        except OSError:
            os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported


def open_model(
    options: ModelOptions, methods: Sequence[Method], terminal: Terminal
) -> tuple[Any, Any]:
    """Loads the model and makes sure that the methods can work on it.

    Returns:
        The model on its device, in evaluation mode, and its processor.

    Raises:
        InputError: If the model cannot be found or loaded.
        MissingTensors: If its weights are incomplete.
        UnsupportedModel: If a method cannot work on this model.
        IncompatibleMethods: If the methods exclude each other.
    """
    check_model_name(options.id)
    import mmlm
    from mmlm.inputs import use_chat_template

    library_bars(terminal.progress)
    model, processor = mmlm.load(
        options.id,
        dtype=options.dtype,
        attention=options.attention,
        device=_device(options.device),
    )
    use_chat_template(processor, options.chat_template)
    with mmlm.attach(model, *methods, processor=processor):
        pass
    return model, processor


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    if not torch.cuda.is_available():
        return "cpu"
    # Every process that a launcher starts on a machine gets a GPU of its own.
    return f"cuda:{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else "cuda"
