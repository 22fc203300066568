"""Options that several commands share, and what they stand for: the model and the methods."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from mmlm.cli.frame import Terminal
    from mmlm.engine.method import Method

__all__ = ["ModelOptions", "method_field", "open_model", "parse_methods"]

EMBEDDED = "embedded"


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
    import transformers

    import mmlm
    from mmlm.inputs import use_chat_template

    transformers.utils.logging.set_verbosity_error()
    if not terminal.progress:
        transformers.utils.logging.disable_progress_bar()
    model, processor = mmlm.load(
        options.id,
        dtype=options.dtype,
        attention=options.attention,
        device=_device(options.device),
    )
    use_chat_template(processor, options.chat_template)
    with mmlm.attach(model, *methods):
        pass
    return model, processor


def _device(name: str) -> str:
    if name != "auto":
        return name
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
