"""What the log-probabilities of a reference depend on, as hashes and plain values.

Two runs whose contents agree get the same numbers from their reference; where they differ, the
name of the part that does says why stored numbers cannot be used.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmlm.errors import ImageReadError, InputError
from mmlm.records import file_hash, plain_json
from training.adapters import adapter_prefixes, bare_name
from training.gather import is_main, on_main, whole_tensors

if TYPE_CHECKING:
    from torch import Tensor, nn
    from transformers import ProcessorMixin

__all__ = [
    "collator_facts",
    "identifier",
    "processor_facts",
    "row_contents",
    "tokens_hash",
    "weights_hash",
]

THREADS = 4
"""Hashing lets go of the interpreter, so that a few threads use a few cores; each holds at most
one tensor's copy."""
_NOT_CONTENT = {"id", "images", "image", "meta", "ref_chosen_logps", "ref_rejected_logps"}
#: Settings of a collator that decide whether a row is taken, but not what becomes of it.
_CHOICES = {"max_length", "overlong", "on_bad_image", "pad_to_multiple_of", "return_tensors"}


def identifier(row: Any) -> str:
    """The id of a row, whether it is an object or a mapping.

    Raises:
        InputError: it has none.
    """
    value = row.get("id") if isinstance(row, Mapping) else row.id
    if value is None:
        raise InputError(
            f"a row has no id; its fields are {', '.join(map(str, row))}",
            advice="Give every row an id: stored reference values are found by it.",
        )
    return str(value)


def row_contents(rows: Sequence[Any]) -> list[dict[str, str]]:
    """What each row consists of.

    Args:
        rows: preference rows, objects or mappings. Pictures are paths, bytes or PIL images.

    Returns:
        For each row the hashes ``images`` (all bytes of all its pictures, in order) and ``text``
        (everything else but id and meta).

    Raises:
        ImageReadError: a picture's file cannot be read.
    """
    pictures = [_pictures(row) for row in rows]
    paths = sorted({str(p) for own in pictures for p in own if isinstance(p, (str, Path))})
    with ThreadPoolExecutor(THREADS) as pool:
        files = dict(zip(paths, pool.map(_file_hash, paths), strict=True))
    return [
        {
            "images": _hash(files[str(p)] if str(p) in files else _picture_hash(p) for p in own),
            "text": _hash([json.dumps(_text(row), sort_keys=True)]),
        }
        for row, own in zip(rows, pictures, strict=True)
    ]


def _fields(row: Any) -> Mapping[str, Any]:
    if isinstance(row, Mapping):
        return row
    return {field.name: getattr(row, field.name) for field in dataclasses.fields(row)}


def _pictures(row: Any) -> list[Any]:
    fields = _fields(row)
    if fields.get("image") is not None:
        return [fields["image"]]
    return list(fields.get("images") or ())


def _text(row: Any) -> dict[str, Any]:
    return {name: value for name, value in _fields(row).items() if name not in _NOT_CONTENT}


def _file_hash(path: str) -> str:
    try:
        return file_hash(Path(path))
    except OSError as error:
        raise ImageReadError(
            f"the picture {path!r} cannot be read: {error.strerror}",
            advice="Check the path, or leave the row out.",
        ) from error


def _picture_hash(picture: Any) -> str:
    if isinstance(picture, Mapping):  # as datasets stores them: {"bytes": ..., "path": ...}
        picture = picture["path"] if picture.get("bytes") is None else picture["bytes"]
    if isinstance(picture, (str, Path)):
        return _file_hash(str(picture))
    if isinstance(picture, bytes):
        return f"sha256:{hashlib.sha256(picture).hexdigest()}"
    return _hash([picture.mode, str(picture.size), picture.tobytes()])


def _hash(parts: Iterable[str | bytes]) -> str:
    """SHA-256 of several parts; their borders count."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(f"{len(data)}:".encode() + data)
    return total.hexdigest()


def tokens_hash(batch: Mapping[str, Tensor], pair: int) -> str:
    """Hash of what a model is given of one pair: ids and scored positions, without padding.

    Args:
        batch: rows [chosen x B; rejected x B].
        pair: which of the B.
    """
    half = batch["input_ids"].shape[0] // 2
    parts = []
    for row in (pair, pair + half):
        real = batch["attention_mask"][row].bool()
        for name in ("input_ids", "completion_mask"):
            parts.append(batch[name][row][real].cpu().long().numpy().tobytes())
    return _hash(parts)


def processor_facts(processor: ProcessorMixin) -> dict[str, Any]:
    """What a processor does with a text and a picture.

    Returns:
        ``tokenizer`` and ``chat_template`` as hashes, ``image_processor`` (sizes, pixel limits,
        means) and ``processor`` (tokens per image ...) as plain values.
    """
    tokenizer = processor.tokenizer
    text = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else tokenizer.get_vocab()
    # The state of padding and truncation is left behind in it by whatever was tokenised last.
    content = (
        {**json.loads(text), "padding": None, "truncation": None} if tokenizer.is_fast else text
    )
    template = processor.chat_template or tokenizer.chat_template
    return {
        "tokenizer": _hash([json.dumps(content, sort_keys=True)]),
        "chat_template": _hash([json.dumps(template, sort_keys=True)]),
        "image_processor": plain_json(json.loads(processor.image_processor.to_json_string())),
        "processor": _plain({k: v for k, v in vars(processor).items() if k != "chat_template"}),
    }


def collator_facts(collator: Any) -> dict[str, Any]:
    """A collator's class and the settings that change what it makes of a row."""
    settings = {name: value for name, value in vars(collator).items() if name not in _CHOICES}
    return {"class": type(collator).__qualname__, **_plain(settings)}


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The public entries that JSON knows."""
    kinds = (bool, int, float, str, type(None))
    return {
        name: value
        for name, value in sorted(values.items())
        if isinstance(value, kinds) and not name.startswith("_")
    }


def weights_hash(model: nn.Module, adapter: str | None = None) -> str:
    """Hash of the weights of a reference; every process must call it.

    Names are those of the bare model, whether or not it is wrapped by PEFT: the reference of a
    LoRA training is the same whatever rank and layers the adapter has.

    Args:
        model: possibly a ``PeftModel``, not wrapped by DeepSpeed or DDP; its parameters may be
            divided among processes.
        adapter: name of the adapter that is part of the reference, None for none.
    """
    skipped = adapter_prefixes(model)

    def wanted(name: str) -> bool:
        if not name.startswith(skipped):
            return True
        return adapter is not None and f".{adapter}" in name

    jobs: dict[str, Future[str]] = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for name, tensor, number in whole_tensors(model, wanted):
            if not is_main():
                continue
            jobs[bare_name(name)] = job = pool.submit(_tensor_hash, tensor)
            if number is not None:
                job.result()  # the tensor is whole only until the next is asked for
    return on_main(lambda: _hash(f"{name} {jobs[name].result()}" for name in sorted(jobs)))


def _tensor_hash(tensor: Tensor) -> str:
    import torch

    data = tensor.contiguous().reshape(-1).view(torch.uint8).cpu().numpy()
    return _hash([str(tensor.dtype), str(tuple(tensor.shape)), hashlib.sha256(data).hexdigest()])
