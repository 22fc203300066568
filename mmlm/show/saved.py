"""Conversations as JSON: strict when read, since anybody may have written the file."""

from __future__ import annotations

import base64
import binascii
import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mmlm.errors import InputError
from mmlm.images import load_image
from mmlm.records import write_json
from mmlm.show.conversation import Conversation, Picture, Turn
from mmlm.show.truth import Known

__all__ = ["FORMAT", "LARGEST", "as_json", "from_json", "read", "write"]

FORMAT = "mmlm-conversation/1"
LARGEST = 256 * 2**20
"""Largest file that is read (bytes)."""
_DATA_URL = "data:image/png;base64,"


def write(conversation: Conversation, path: Path, *, embed: bool) -> None:
    """See :meth:`mmlm.show.conversation.Conversation.save`."""
    if not path.parent.is_dir():
        raise InputError(
            f"There is no folder {str(path.parent)!r}.", advice="Make it first, or choose another."
        )
    if path.exists() and not _is_ours(path):
        raise InputError(
            f"{str(path)!r} exists and holds no conversation.", advice="Choose another name."
        )
    write_json(path, as_json(conversation, path.resolve().parent, embed=embed))


def _is_ours(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as stream:
        return FORMAT.encode() in stream.read(200)


def read(path: Path) -> Conversation:
    """See :meth:`mmlm.show.conversation.Conversation.load`."""
    if not path.is_file():
        raise InputError(f"There is no file {str(path)!r}.", advice="Check the path.")
    if path.stat().st_size > LARGEST:
        raise InputError(
            f"{str(path)!r} is larger than {LARGEST >> 20} MiB.", advice="Is it a conversation?"
        )
    try:
        data = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"{str(path)!r} is no JSON: {error}.", advice="Give a file that /save wrote."
        ) from error
    return from_json(data, path.resolve().parent)


def as_json(
    conversation: Conversation, folder: Path | None = None, *, embed: bool = False
) -> dict[str, Any]:
    """A conversation as JSON values.

    Args:
        conversation: The conversation.
        folder: Where the file will be: pictures below it are named from there, so that the folder
            may move. None: by their whole path.
        embed: Put all pictures in, not only those without a file.
    """

    def pictures(given: tuple[Picture, ...]) -> list[dict[str, Any]]:
        return [_picture_as_json(picture, folder, embed) for picture in given]

    turns = [
        {
            "question": turn.question,
            "pictures": pictures(turn.pictures),
            "answer": turn.answer,
            "methods": list(turn.methods),
            "model": turn.model,
        }
        for turn in conversation.turns
    ]
    return {"format": FORMAT, "turns": turns, "pending": pictures(conversation.pending)}


def _picture_as_json(picture: Picture, folder: Path | None, embed: bool) -> dict[str, Any]:
    value: dict[str, Any] = {"name": picture.name}
    if picture.path is None or embed:
        buffer = io.BytesIO()
        picture.image.save(buffer, "PNG")
        value["data"] = _DATA_URL + base64.b64encode(buffer.getvalue()).decode()
    else:
        below = folder is not None and picture.path.is_relative_to(folder)
        value["path"] = str(picture.path.relative_to(folder) if below and folder else picture.path)
        value["sha256"] = picture.digest
    if picture.known is not None:
        known = picture.known
        value["known"] = {
            "objects": sorted(known.objects),
            "source": known.source,
            "asked": None if known.asked is None else sorted(known.asked),
        }
    return value


def from_json(data: object, folder: Path | None) -> Conversation:
    """A conversation from JSON values; every key and type is checked.

    Args:
        data: What :func:`as_json` gave.
        folder: Where pictures named by a relative path are. None: pictures must be in the data;
            for data from somebody who must not read files of this machine.

    Raises:
        InputError: If something else is there; says where and what.
        ImageReadError: If a picture cannot be read.
    """
    values = _object(data, "the file", {"format", "turns", "pending"})
    if values["format"] != FORMAT:
        raise _refused("format", f"{FORMAT!r}", values["format"])
    places = list(enumerate(_list(values["turns"], "turns")))
    turns = tuple(_turn(turn, f"turns[{number}]", folder) for number, turn in places)
    for number, turn in enumerate(turns[:-1]):
        if not turn.answer:
            raise _refused(f"turns[{number}].answer", "an answer (only the last may lack it)", "")
    return Conversation(turns, _pictures(values["pending"], "pending", folder))


def _turn(data: object, place: str, folder: Path | None) -> Turn:
    keys = {"question", "pictures", "answer", "methods", "model"}
    values = _object(data, place, keys)
    question = _text(values["question"], f"{place}.question")
    if not question.strip():
        raise _refused(f"{place}.question", "a question", question)
    methods = _list(values["methods"], f"{place}.methods")
    return Turn(
        question=question,
        pictures=_pictures(values["pictures"], f"{place}.pictures", folder),
        answer=_text(values["answer"], f"{place}.answer"),
        methods=tuple(_text(one, f"{place}.methods[{n}]") for n, one in enumerate(methods)),
        model=_text(values["model"], f"{place}.model"),
    )


def _pictures(data: object, place: str, folder: Path | None) -> tuple[Picture, ...]:
    places = enumerate(_list(data, place))
    return tuple(_picture(one, f"{place}[{number}]", folder) for number, one in places)


def _picture(data: object, place: str, folder: Path | None) -> Picture:
    is_path = isinstance(data, dict) and "path" in data
    content = {"path", "sha256"} if is_path else {"data"}
    values = _object(data, place, {"name", *content}, optional={"known"})
    name = _text(values["name"], f"{place}.name")
    known = _known(values["known"], f"{place}.known") if "known" in values else None
    if not is_path:
        return Picture(name, load_image(_decoded(values["data"], f"{place}.data")), known=known)
    path, digest = (_text(values[key], f"{place}.{key}") for key in ("path", "sha256"))
    if folder is None:
        raise InputError(
            f"{place} names the file {path!r}, and files of this machine are not read here.",
            advice="Save the conversation with its pictures inside (`/save FILE embed`).",
        )
    picture = Picture.read(folder / path, known)
    if picture.digest != digest:
        raise InputError(
            f"The picture {path!r} is not the one that the conversation was about: its content "
            "has changed.",
            advice="Restore it, or begin a new conversation with /image.",
        )
    return Picture(name, picture.image, picture.path, digest, known)


def _decoded(data: object, place: str) -> bytes:
    text = _text(data, place)
    try:
        if not text.startswith(_DATA_URL):
            raise binascii.Error
        return base64.b64decode(text.removeprefix(_DATA_URL), validate=True)
    except binascii.Error:
        raise _refused(place, f"a PNG as {_DATA_URL}...", text[:40]) from None


def _known(data: object, place: str) -> Known:
    values = _object(data, place, {"objects", "source", "asked"})
    source = _text(values["source"], f"{place}.source")
    asked = values["asked"]
    return Known(
        _names(values["objects"], f"{place}.objects"),
        source,
        None if asked is None else _names(asked, f"{place}.asked"),
    )


def _names(data: object, place: str) -> frozenset[str]:
    names = enumerate(_list(data, place))
    return frozenset(_text(name, f"{place}[{number}]") for number, name in names)


def _object(
    data: object, place: str, keys: set[str], optional: frozenset[str] | set[str] = frozenset()
) -> Mapping[str, Any]:
    if not isinstance(data, dict):
        raise _refused(place, "an object", data)
    missing, unknown = keys - data.keys(), data.keys() - keys - optional
    if missing or unknown:
        wrong = [f"lacks {key!r}" for key in sorted(missing)]
        wrong += [f"has the unknown key {key!r}" for key in sorted(unknown)]
        raise InputError(
            f"{place} {', '.join(wrong)}.", advice="Give a conversation as /save writes it."
        )
    return data


def _list(data: object, place: str) -> list[Any]:
    if not isinstance(data, list):
        raise _refused(place, "a list", data)
    return data


def _text(data: object, place: str) -> str:
    if not isinstance(data, str):
        raise _refused(place, "text", data)
    return data


def _refused(place: str, expected: str, given: object) -> InputError:
    shown = json.dumps(given)
    shown = shown if len(shown) <= 60 else f"{shown[:60]}..."
    return InputError(
        f"In a conversation, {place} must be {expected}, not {shown}.",
        advice="Give a conversation as /save writes it.",
    )
