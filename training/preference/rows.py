"""Preference rows: a better and a worse answer to the same prompt, behind the same begun answer.

`read_rows` reads the files of `mmlm data`. Two forms are known, and told apart by their fields:

    {"id", "images", "question", "context", "chosen", "rejected", "chosen_final",
     "rejected_final", "is_final", ...}                       SENTINEL's pairs.jsonl
    {"id", "images", "prompt", "context", "chosen", "rejected", "chosen_complete",
     "rejected_complete", "complete", "meta", ...}            MIA-DPO's, and `mmlm data convert`'s

``prompt`` is the user's turn as segments, or a list of messages. What is not named here is kept as
``meta``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmlm.errors import InputError
from mmlm.inputs import Message
from mmlm.records import read_lines
from training.errors import MissingField, PictureCountMismatch, UnusableResponse, WrongFieldType

__all__ = ["PreferenceRow", "as_row", "check_row", "read_rows"]

_NEEDED = ("prompt", "chosen", "rejected")
_ADVICE = "`mmlm data convert` turns published files into rows; docs/data.md describes them."


@dataclass(frozen=True)
class PreferenceRow:
    """A better and a worse answer to the same prompt.

    Attributes:
        id: Unique among the rows of a training.
        images: Paths of the pictures (absolute as `read_rows` gives them), in the order of the
            prompt's image segments. From a table they may be decoded pictures or bytes.
        prompt: Messages in Hugging Face chat format, the last of the user; every content is a list
            of ``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
        chosen: The better answer. Blanks around answers do not count: the template's own are used.
        rejected: The worse answer.
        context: What the assistant has said already: it stands before both answers, is read and
            never scored (C-DPO, arXiv 2507.12455, equation 6). "" if the answers begin the turn.
        chosen_ends: Whether the better answer ends the turn, so that an end token belongs behind
            it. A sentence of a caption that goes on does not.
        rejected_ends: Likewise.
        meta: Everything else that the source says.
    """

    id: str
    images: tuple[Any, ...]
    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    context: str = ""
    chosen_ends: bool = True
    rejected_ends: bool = True
    meta: Mapping[str, Any] = field(default_factory=dict)


def read_rows(files: Sequence[str], image_folder: str | None = None) -> list[PreferenceRow]:
    """Reads rows; the pictures themselves are not opened.

    Args:
        files: JSON lines, see the module's docstring.
        image_folder: Where relative paths of pictures start. Default: the folder of their file.

    Returns:
        All rows, in the order of the files.

    Raises:
        InputError: If a file cannot be read, there is no row, an id comes twice, or a row cannot
            be learned from; names file and line.
        MissingField: If a row lacks a field (also a KeyError).
        WrongFieldType: If a field is of another type than it must be (also a TypeError).
    """
    rows: list[PreferenceRow] = []
    places: dict[str, str] = {}
    for file in files:
        folder = Path(image_folder) if image_folder else Path(file).parent
        for number, line in _numbered(Path(file)):
            place = f"{file}, line {number}"
            row = _named(place, lambda line=line, folder=folder: _row_of_line(line, folder))
            if row.id in places:
                raise InputError(
                    f"{place}: the id {row.id!r} stands in {places[row.id]} already.",
                    advice="Give every pair an id of its own.",
                )
            places[row.id] = place
            rows.append(row)
    if not rows:
        raise InputError(
            f"There are no pairs in {', '.join(map(repr, files)) or 'no files'}.",
            advice="Give at least one file with at least one row.",
        )
    return rows


def _numbered(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """The objects of a file with the numbers of their lines."""
    values = read_lines(path)
    text = path.read_text(encoding="utf-8")
    numbers = [n for n, line in enumerate(text.split("\n"), start=1) if line.strip()]
    return list(zip(numbers, values, strict=True))


def _named(place: str, make: Callable[[], PreferenceRow]) -> PreferenceRow:
    """What ``make`` returns; its errors with the place in front."""
    try:
        return make()
    except InputError as error:
        raise type(error)(f"{place}: {error}", advice=error.advice) from error


def _row_of_line(line: Mapping[str, Any], folder: Path) -> PreferenceRow:
    if "reason" in line and "ratio" in line:
        raise InputError(
            f"`reason` is {line['reason']!r}: this record was dropped by a filter.",
            advice="Give pairs.jsonl, not dropped.jsonl.",
        )
    ours = "prompt" in line
    if not ours and "question" not in line:
        raise _missing("`prompt` and no `question`", line)
    for name in ("id", "chosen", "rejected"):
        if line.get(name) is None:
            raise _missing(f"`{name}`", line)
    images = line.get("images")
    if not isinstance(images, list) or not all(isinstance(one, str) and one for one in images):
        raise _wrong(f"`images` must be a list of paths, got {images!r}.")
    prompt: Any = line.get("prompt")
    if not ours:
        places = [{"type": "image"}] * len(images)
        prompt = [*places, {"type": "text", "text": _text(line, "question")}]
    ends = ("chosen_complete", "rejected_complete", "complete")
    if not ours:
        ends = ("chosen_final", "rejected_final", "is_final")
    known = {"id", "images", "prompt", "question", "context", *_NEEDED, *ends, "meta"}
    meta = line.get("meta") or {}
    if not isinstance(meta, Mapping):
        raise _wrong(f"`meta` must be an object, got {meta!r}.")
    row = as_row(
        {
            **{name: line[name] for name in ("id", "chosen", "rejected")},
            "images": [str((folder / path).absolute()) for path in images],
            "prompt": prompt,
            "context": line.get("context") or "",
            "chosen_ends": _ends(line, ends[0], ends[2]),
            "rejected_ends": _ends(line, ends[1], ends[2]),
            "meta": {**{k: v for k, v in line.items() if k not in known}, **meta},
        }
    )
    check_row(row)
    return row


def _ends(line: Mapping[str, Any], own: str, both: str) -> bool:
    """Whether an answer ends the turn: its own field, else that of both, else yes."""
    for name in (own, both):
        value = line.get(name)
        if isinstance(value, bool):
            return value
        if value is not None:
            raise _wrong(f"`{name}` must be true or false, got {value!r}.")
    return True


def as_row(values: Mapping[str, Any] | PreferenceRow) -> PreferenceRow:
    """A row from a mapping: our fields, or TRL's columns in chat form.

    Answers may be text, or one message of the assistant; a prompt may be segments, or messages
    whose contents are text (then all pictures stand before the first of the user's, as TRL does).

    Args:
        values: The fields; ``image`` may stand for one picture. Unknown fields are ignored.

    Raises:
        MissingField: If there is no prompt, chosen or rejected; names the fields there are.
        WrongFieldType: If one of them is neither text nor messages.
    """
    if isinstance(values, PreferenceRow):
        return values
    for name in (*_NEEDED, "id"):
        if values.get(name) is None:
            if name == "id" and "id" not in values:
                continue  # TRL's rows have none
            raise _missing(f"`{name}`", values)
    identifier = values.get("id", "?")
    if isinstance(identifier, bool) or not isinstance(identifier, (str, int)) or identifier == "":
        raise _wrong(f"`id` must be text or a number, got {identifier!r}.")
    single = values.get("image")
    images = values.get("images") if single is None else [single]
    context = _text(values, "context") if values.get("context") else ""
    names = ("chosen_ends", "rejected_ends", "meta")
    rest = {name: values[name] for name in names if values.get(name) is not None}
    images = tuple(images or ())
    return PreferenceRow(
        id=str(identifier),
        images=images,
        prompt=_messages(values["prompt"], len(images)),
        chosen=_answer(values, "chosen"),
        rejected=_answer(values, "rejected"),
        context=context.rstrip(),
        **rest,
    )


def check_row(row: PreferenceRow) -> None:
    """Refuses a row that cannot be learned from, whatever the model.

    Raises:
        PictureCountMismatch: If pictures and image segments are not as many (also a ValueError).
        UnusableResponse: If an answer is empty (also a ValueError).
        InputError: If the user does not speak last, or the prompt has no text.
    """
    n_places = sum(part["type"] == "image" for one in row.prompt for part in one["content"])
    if n_places != len(row.images):
        raise PictureCountMismatch(
            f"row {row.id!r} has {len(row.images)} pictures and {n_places} image placeholders.",
            advice='Put one {"type": "image"} segment per picture into `prompt`.',
        )
    if not row.prompt or row.prompt[-1]["role"] != "user":
        roles = ", ".join(one["role"] for one in row.prompt) or "none"
        raise InputError(
            f"row {row.id!r}: the turns before the answer are {roles}; the user must speak last.",
            advice="What the assistant has begun to say belongs into `context`.",
        )
    for name in ("chosen", "rejected"):
        if not getattr(row, name).strip():
            raise UnusableResponse(f"row {row.id!r}: `{name}` is empty.", advice="Remove the row.")


def _messages(prompt: Any, n_images: int) -> tuple[Message, ...]:
    if not isinstance(prompt, (list, tuple)) or not all(isinstance(one, Mapping) for one in prompt):
        raise WrongFieldType(
            f"`prompt` must be a list of messages or segments, got {type(prompt).__name__}.",
            advice="Rendered text cannot be used: give the messages, and the model's own template "
            "is applied.",
        )
    messages = prompt if prompt and "role" in prompt[0] else [{"role": "user", "content": prompt}]
    plain = all(isinstance(one.get("content"), str) for one in messages)
    made: list[Message] = []
    for one in messages:
        content = one.get("content")
        if isinstance(content, str):
            content = [{"type": "text", "text": content}]
            if plain and one.get("role") == "user":
                content = [*([{"type": "image"}] * n_images), *content]
                plain = False  # all of them stand in the first message
        if not isinstance(content, (list, tuple)):
            raise _wrong(
                f"the content of a message must be segments or text, got {type(content).__name__}."
            )
        role = one.get("role")
        made.append({"role": str(role), "content": [_segment(part) for part in content]})
    return tuple(made)


def _segment(part: Any) -> dict[str, str]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "image":
        return {"type": "image"}
    if kind == "text" and isinstance(part.get("text"), str):
        return {"type": "text", "text": part["text"]}
    raise _wrong(f"a segment must be an image or a text, got {part!r}.")


def _answer(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if isinstance(value, (list, tuple)):
        one = value[0] if len(value) == 1 else None
        if isinstance(one, Mapping) and one.get("role") == "assistant":
            value = one.get("content")
            if isinstance(value, (list, tuple)) and all(
                isinstance(part, Mapping) and isinstance(part.get("text"), str) for part in value
            ):
                value = "".join(part["text"] for part in value)
        else:
            raise _wrong(f"`{name}` must be text or one message of the assistant.")
    if not isinstance(value, str):
        raise _wrong(f"`{name}` must be text or messages, got {type(value).__name__}.")
    return value


def _text(values: Mapping[str, Any], name: str) -> str:
    value = values[name]
    if not isinstance(value, str):
        raise _wrong(f"`{name}` must be text, got {type(value).__name__}.")
    return value


def _wrong(message: str) -> WrongFieldType:
    return WrongFieldType(message, advice=_ADVICE)


def _missing(what: str, values: Mapping[str, Any]) -> MissingField:
    names = ", ".join(sorted(map(str, values))) or "none"
    return MissingField(f"there is no {what}; its fields are {names}.", advice=_ADVICE)
