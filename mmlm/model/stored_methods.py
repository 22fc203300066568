"""Methods that are built into a stored model: two files beside its checkpoint.

``methods.yaml`` holds their text forms, ``methods.safetensors`` their weights. Plain transformers
never looks at either.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import InputError, raise_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel, ProcessorMixin

__all__ = [
    "METHODS_FILE",
    "WEIGHTS_FILE",
    "parted",
    "restore_methods",
    "store_methods",
]

METHODS_FILE = "methods.yaml"
WEIGHTS_FILE = "methods.safetensors"
#: As :data:`mmlm.engine.method.MODULES`; importing that would cost seconds.
MODULES = "mmlm_methods"


def parted(tensors: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tensors of the model, and those of the methods built into it."""
    own = {n: x for n, x in tensors.items() if n.startswith(f"{MODULES}.")}
    rest = {n: x for n, x in tensors.items() if n not in own}
    return rest, {n.removeprefix(f"{MODULES}."): x for n, x in own.items()}


def store_methods(model: PreTrainedModel, folder: Path, weights: dict[str, Any]) -> None:
    """Writes the built-in methods beside the checkpoint; without any, takes older files away."""
    import yaml
    from safetensors.torch import save_file

    from mmlm.engine.build_in import built_in

    texts = [method.text for method in built_in(model)]
    if texts:
        text = yaml.safe_dump({"methods": texts}, sort_keys=False, allow_unicode=True, width=1000)
        (folder / METHODS_FILE).write_text(text, encoding="utf-8")
    else:
        (folder / METHODS_FILE).unlink(missing_ok=True)
    if weights:
        own = {name: x.detach().cpu().contiguous().clone() for name, x in weights.items()}
        save_file(own, folder / WEIGHTS_FILE, metadata={"format": "pt"})
    else:
        (folder / WEIGHTS_FILE).unlink(missing_ok=True)


def restore_methods(model: PreTrainedModel, processor: ProcessorMixin, source: str) -> None:
    """Builds the methods in that are stored beside a checkpoint, if there are any.

    Raises:
        InputError: If a method cannot be read.
        MissingTensors: If the stored weights are not exactly those of the methods.
    """
    import yaml
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    from mmlm.engine.build_in import build_in
    from mmlm.text_form import parse_method

    names = (METHODS_FILE, WEIGHTS_FILE)
    specification, stored = (_beside(source, name) for name in names)
    if specification is None:
        if stored is not None:
            raise InputError(
                f"{source!r} has {WEIGHTS_FILE} but no {METHODS_FILE}, so it is not known which "
                "methods the weights belong to",
                advice="Copy both files, or remove the first to load the model without methods.",
            )
        return
    try:
        content = yaml.safe_load(specification.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        raise InputError(
            f"{specification} cannot be read: {str(error).splitlines()[0]}",
            advice="Copy it again, or remove it to load the model without methods.",
        ) from error
    texts = content.get("methods") if isinstance(content, dict) else None
    if not isinstance(texts, list) or not texts or not all(isinstance(t, str) for t in texts):
        raise InputError(
            f"{specification} must hold `methods:` and a list of text forms, got {content!r}",
            advice="Copy it again, or remove it to load the model without methods.",
        )
    build_in(model, *map(parse_method, texts), processor=processor)
    try:
        tensors = {} if stored is None else load_file(stored)
    except SafetensorError as error:
        raise InputError(
            f"{stored} cannot be read: {error}",
            advice="The file is incomplete; copy it again.",
        ) from error
    _fill(source, model, tensors)


def _fill(source: str, model: PreTrainedModel, tensors: dict[str, Any]) -> None:
    """Loads the methods' weights; every name and shape must agree."""
    from mmlm.engine.weights import misfits

    _, own = parted(model.state_dict())
    kinds = misfits(own, tensors)
    raise_for(kinds, f"the methods stored in {source!r} do not fit their weights")
    if tensors:
        getattr(model, MODULES).load_state_dict(tensors)


def _beside(source: str, name: str) -> Path | None:
    """A file of a checkpoint that most checkpoints do not have."""
    from transformers.utils.hub import cached_file

    folder = Path(source)
    if folder.is_dir():
        return folder / name if (folder / name).exists() else None
    found = cached_file(
        source,
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )
    return None if found is None else Path(found)
