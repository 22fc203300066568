"""What the decoder gets for each image token, of every picture of a data set, in one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, UnsupportedModel
from mmlm.progress import progress_bar

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from mmlm.images import ImageSource

__all__ = ["capture", "features_of", "similar"]


class _SeenEnoughError(Exception):
    """Ends a pass once the first layer's input is known."""


def capture(
    model: Any,
    processor: Any,
    pictures: Mapping[str, ImageSource],
    path: Path,
    *,
    progress: bool = False,
) -> dict[str, Tensor]:
    """The features of every picture; read from the file if they are there, else written to it.

    Args:
        model: A Hugging Face vision-language model.
        processor: Its processor.
        pictures: The pictures by name.
        path: A safetensors file. Its name must tell model and pictures apart.
        progress: Show a progress bar.

    Returns:
        By name [tokens, D] in the model's number format.
    """
    from safetensors.torch import load_file, save_file

    if path.exists():
        found = load_file(path)
        if found.keys() == pictures.keys():
            return found
        raise InputError(
            f"{str(path)!r} holds features of other pictures.", advice="Choose another --output."
        )
    found = {}
    with progress_bar(len(pictures), progress, "Features") as advance:
        for name, picture in pictures.items():
            found[name] = features_of(model, processor, picture).contiguous().cpu()
            advance(1, "")
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    save_file(found, part)
    part.replace(path)
    return found


def features_of(model: Any, processor: Any, picture: ImageSource) -> Tensor:
    """The first decoder layer's input at the picture's tokens, [tokens, D].

    Raises:
        UnsupportedModel: If the first layer was never reached.
    """
    import torch

    from mmlm.engine.anatomy import Anatomy
    from mmlm.inputs import load_image, message, prepare

    anatomy = Anatomy(model)
    inputs = prepare(
        processor,
        [[message("user", "", 1)]],
        [[load_image(picture)]],
        device=model.device,
        dtype=model.dtype,
    )
    found: list[Tensor] = []

    def look(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        states = arguments[0] if arguments else named["hidden_states"]
        visual = torch.isin(
            inputs["input_ids"][0], inputs["input_ids"].new_tensor(anatomy.image_ids)
        )
        found.append(states[0, visual])
        raise _SeenEnoughError

    handle = anatomy.layers[0].register_forward_pre_hook(look, with_kwargs=True)
    try:
        with torch.inference_mode():
            model(**inputs)
    except _SeenEnoughError:
        return found[0].clone()
    finally:
        handle.remove()
    raise UnsupportedModel(
        f"The first decoder layer of {type(model).__name__} is not run for a prompt.",
        advice="Take --level world, which needs no features.",
    )


def similar(one: Tensor, other: Tensor) -> float:
    """Cosine of the mean features of two regions, [n, D] and [m, D]."""
    from torch.nn import functional

    a, b = one.float().mean(0), other.float().mean(0)
    return float(functional.cosine_similarity(a, b, dim=0))
