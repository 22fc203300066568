"""``mmlm assemble``: a new LLaVA from a vision tower and a language model, as a folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from mmlm.cli.frame import DONE, Command, Terminal
from mmlm.cli.options import check_model_name
from mmlm.errors import InputError
from mmlm.progress import library_bars

__all__ = ["COMMAND", "Assemble", "run"]


@dataclass(frozen=True)
class Assemble:
    """Options of ``mmlm assemble``.

    Attributes:
        vision: The tower: a folder or Hugging Face id (CLIP, SigLIP, DINOv2, ViT ...), or
            open_clip:X, where X is a folder, an id, or a name of open_clip.
        language: The language model: a folder, a Hugging Face id, or a GGUF file.
        output: Folder for the new model; it must be new or empty.
        vision_weights: For a name of open_clip: a file, a tag such as `openai`, or `random`.
        image_processor: Folder or id of an image processor, instead of the tower's own.
        tokenizer: Folder or id of a tokenizer, instead of the language model's own.
        chat_template: `model` is the language model's own, extended by pictures (LLaVA-1.5's if it
            has none); `vicuna` is LLaVA-1.5's; anything else is the path of a Jinja file.
        image_token: Placeholder of a picture's features, added to the tokenizer if unknown.
        feature_layer: Hidden state of the tower that is used; LLaVA-1.5 takes -2.
        feature_strategy: `default` leaves the class token out, `full` keeps all tokens, `auto` is
            `default` for towers with a class token.
        projector_activation: Activation between the projector's two layers.
        pad_to_multiple_of: The vocabulary's rows become a multiple of it; 1 pads nothing.
        dtype: Number format of the stored weights; `auto` is the language model's.
        seed: Seed of the projector's weights.
    """

    vision: str
    language: str
    output: Path
    vision_weights: str = ""
    image_processor: str = ""
    tokenizer: str = ""
    chat_template: str = "model"
    image_token: str = "<image>"
    feature_layer: int = -2
    feature_strategy: Literal["auto", "default", "full"] = "auto"
    projector_activation: str = "gelu"
    pad_to_multiple_of: int = 1
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "auto"
    seed: int = 0


def run(settings: Assemble, terminal: Terminal) -> int:
    """Composes the model and writes it.

    Raises:
        InputError: If a part is not found or does not fit, or the output is not empty.
        MissingTensors: If a checkpoint does not fill its model.
        UnsupportedModel: If stock LLaVA cannot hold one of the parts.
    """
    template = _check(settings)
    from mmlm.model.checkpoint import save
    from mmlm.model.compose import compose

    library_bars(terminal.progress)
    model, processor = compose(
        settings.vision,
        settings.language,
        vision_weights=settings.vision_weights or None,
        image_processor=settings.image_processor or None,
        tokenizer=settings.tokenizer or None,
        chat_template=template,
        image_token=settings.image_token,
        vision_feature_layer=settings.feature_layer,
        vision_feature_select_strategy=settings.feature_strategy,
        projector_activation=settings.projector_activation,
        pad_to_multiple_of=None
        if settings.pad_to_multiple_of == 1
        else settings.pad_to_multiple_of,
        dtype=settings.dtype,
        seed=settings.seed,
    )
    # Beside its place first: a folder of that name is a whole model.
    part = settings.output.with_name(f".{settings.output.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    save(model, processor, part)
    os.replace(part, settings.output)
    report = _report(settings, model, processor)
    if terminal.json:
        terminal.emit(report)
    else:
        terminal.table(_table(report))
    return DONE


def _check(settings: Assemble) -> str | None:
    """Refuses what cannot work before anything large is read; returns the chat template."""
    output = settings.output
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(
            f"the output {str(output)!r} is there already and not an empty folder",
            advice="Give a new folder, or remove it first.",
        )
    if settings.pad_to_multiple_of < 1:
        raise InputError(
            f"pad_to_multiple_of is {settings.pad_to_multiple_of}",
            advice="Give 1 for no padding, or a number such as 64.",
        )
    if not settings.vision.startswith("open_clip:"):
        check_model_name(settings.vision)
    if not settings.language.endswith(".gguf"):
        check_model_name(settings.language)
    if settings.chat_template in ("model", "vicuna"):
        return None if settings.chat_template == "model" else "vicuna"
    path = Path(settings.chat_template)
    if not path.is_file():
        raise InputError(
            f"chat_template {settings.chat_template!r} is no file",
            advice="Take model, vicuna, or the path of a Jinja file.",
        )
    return path.read_text(encoding="utf-8")


def _report(settings: Assemble, model: Any, processor: Any) -> dict[str, Any]:
    inner = model.model
    parts = {
        "vision_tower": inner.vision_tower,
        "projector": inner.multi_modal_projector,
        "language_model": inner.language_model,
        "model": model,
    }
    return {
        "output": str(settings.output),
        "classes": {name: type(part).__name__ for name, part in parts.items()},
        "parameters": {
            name: sum(weight.numel() for weight in part.parameters())
            for name, part in parts.items()
        },
        "tokens_per_image": model.config.image_seq_length,
        "image_size": _size(processor.image_processor),
        "vocabulary": model.config.text_config.vocab_size,
        "image_token_id": model.config.image_token_id,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bytes": sum(path.stat().st_size for path in settings.output.iterdir()),
    }


def _size(image_processor: Any) -> list[int]:
    """Height and width of the pixels that the processor makes of a picture."""
    from PIL import Image

    picture = Image.new("RGB", (48, 32))
    return list(image_processor(picture, return_tensors="pt")["pixel_values"].shape[-2:])


def _table(report: dict[str, Any]) -> Any:
    from rich.table import Table

    table = Table(show_header=False)
    for name, number in report["parameters"].items():
        size = f"{number:,}" if number < 1e6 else f"{number / 1e6:,.1f} million"
        table.add_row(name.replace("_", " "), f"{report['classes'][name]}, {size} parameters")
    height, width = report["image_size"]
    table.add_row("a picture", f"{height} x {width} pixels, {report['tokens_per_image']} tokens")
    table.add_row("vocabulary", f"{report['vocabulary']:,} rows")
    table.add_row(
        "written", f"{report['output']}: {report['bytes'] / 1e6:,.1f} MB {report['dtype']}"
    )
    table.add_row("next", "train the projector; until then pictures mean nothing to the model")
    return table


COMMAND = Command(
    summary="a new LLaVA from any vision tower and language model",
    settings=Assemble,
    run=run,
    example="mmlm assemble --vision openai/clip-vit-large-patch14-336 --language Qwen/Qwen3-0.6B "
    "--output my-llava\nmmlm assemble --vision open_clip:ViT-L-14-336-quickgelu "
    "--vision_weights openai --language SmolLM2-135M.gguf --output my-llava",
)
