"""Single-image instruction data, from which questions about several pictures are made.

Three forms are read, as JSON lines or as one JSON list:

* ``{"id", "image", "question", "answer"}``
* LLaVA-665K: ``{"id", "image", "conversations": [{"from": "human" | "gpt", "value"}, ...]}``
* Hugging Face chat: ``{"id", "image", "messages": [...]}``, as `data_tools.world.export` writes it

A further field ``source`` names the set that a record belongs to (companions come from the same
set); without it the first folder of ``image`` does: ``coco/train2017/1.jpg`` belongs to ``coco``.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from mmlm.errors import InputError
from mmlm.records import locked, read_lines

__all__ = ["Source", "Sources", "digest", "read_sources", "world_sources"]

Turns = Literal["first", "all"]
Round = tuple[str, str]

_BOX = re.compile(r"\[\s*-?\d*\.\d+(?:\s*,\s*-?\d*\.\d+){3}\s*\]")
"""A box in relative coordinates. They are those of the single picture and wrong in any other."""
_PLACEHOLDER = re.compile(r"\s*<image>\s*")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant"}


@dataclass(frozen=True)
class Source:
    """A question about one picture.

    Attributes:
        id: Identifier, unique in the run.
        image: The picture, an absolute path.
        question: What is asked, without placeholders.
        answer: The true answer.
        source: The set it belongs to.
    """

    id: str
    image: Path
    question: str
    answer: str
    source: str


@dataclass(frozen=True)
class Sources:
    """What was read.

    Attributes:
        items: The usable records.
        skipped: How many records were left out, by reason: ``no_image`` (or several), ``no_turn``,
            ``boxes``.
    """

    items: list[Source]
    skipped: Counter[str]


def read_sources(
    path: Path, images: Path | None = None, *, turns: Turns = "first", boxes: bool = False
) -> Sources:
    """Reads single-image instruction data.

    Args:
        path: JSON lines, or a JSON list.
        images: Folder that relative paths of pictures start from; default: that of the file.
        turns: Of a conversation take the ``first`` question only (a later one may refer to what
            was said before), or ``all`` of them, each as a record of its own.
        boxes: Keep records that speak of boxes in coordinates (``[0.1, 0.2, 0.3, 0.4]``).

    Returns:
        The records in the order of the file. An id that comes again (LLaVA-665K has such) gets a
        number: ``17~2``.

    Raises:
        InputError: If the file is missing, no JSON, or a record has none of the known forms (says
            which); or no record can be used.
    """
    folder = (images if images is not None else path.parent).absolute()
    skipped: Counter[str] = Counter()
    seen: Counter[str] = Counter()
    items: list[Source] = []
    for number, record in enumerate(_read(path), start=1):
        rounds = _rounds(record, f"{path}, record {number}")
        image = record.get("image")
        if not isinstance(image, str):
            skipped["no_image"] += 1
        elif not rounds:
            skipped["no_turn"] += 1
        elif not boxes and any(_BOX.search(text) for one in rounds for text in one):
            skipped["boxes"] += 1
        else:
            items += _sources(record, number, folder, rounds[:1] if turns == "first" else rounds)
    unique = []
    for one in items:
        seen[one.id] += 1
        unique.append(replace(one, id=f"{one.id}~{seen[one.id]}") if seen[one.id] > 1 else one)
    if not unique:
        raise InputError(
            f"{str(path)!r} has no record about one picture that can be used.",
            advice="Give JSON lines with id, image, question and answer, or LLaVA's format.",
        )
    return Sources(unique, skipped)


def _sources(
    record: Mapping[str, Any], number: int, folder: Path, rounds: Sequence[Round]
) -> Iterator[Source]:
    image = PurePosixPath(record["image"])
    parts = image.parts[:-1]
    group = record.get("source") or (parts[0] if parts and not image.is_absolute() else "data")
    name = str(record.get("id", number))
    for turn, (question, answer) in enumerate(rounds, start=1):
        identifier = name if turn == 1 else f"{name}#{turn}"
        yield Source(identifier, folder / image, question, answer, str(group))


def world_sources(
    folder: Path, count: int, *, split: str = "natural", seed: int = 0, progress: bool = False
) -> Sources:
    """Scenes of the embedded world with their captions and questions.

    Args:
        folder: Where the pictures go; a folder that the same arguments have filled is used again.
        count: Number of scenes.
        split: A split of the world.
        seed: Seed of the scenes.
        progress: Show a progress bar on standard error.

    Returns:
        Per scene one caption and five questions, each a record of its own; the set is ``world``.

    Raises:
        InputError: If an argument is out of range, or the folder holds something else.
    """
    from data_tools.world.export import write_split

    # Shards that start together want the same pictures.
    with locked(folder):
        write_split(folder, split, count, seed, progress=progress)
    found = read_sources(folder / "conversations.jsonl", turns="all")
    return Sources([replace(one, source="world") for one in found.items], found.skipped)


def digest(sources: Sequence[Source]) -> str:
    """A hash of everything that is said in the records, and of the names of their pictures."""
    state = hashlib.sha256()
    for one in sources:
        fields = asdict(one) | {"image": one.image.name}
        state.update(json.dumps(fields, sort_keys=True).encode() + b"\n")
    return f"sha256:{state.hexdigest()}"


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.is_file() or path.suffix != ".json":
        return read_lines(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{str(path)!r} is no JSON: {error}.", advice="Give a JSON list, or JSON lines."
        ) from error
    if not isinstance(content, list) or not all(isinstance(one, dict) for one in content):
        raise InputError(f"{str(path)!r} is no list of records.", advice="Give a JSON list.")
    return content


def _rounds(record: Mapping[str, Any], where: str) -> list[Round]:
    """Questions and answers of a record in order; empty if it does not have one of each."""
    if "question" in record and "answer" in record:
        said = [("user", record["question"]), ("assistant", record["answer"])]
    elif "conversations" in record:
        said = [(turn.get("from"), turn.get("value")) for turn in record["conversations"]]
    elif "messages" in record:
        said = [(turn.get("role"), _plain(turn.get("content"))) for turn in record["messages"]]
    else:
        raise InputError(
            f"{where} has neither `question` and `answer`, nor `conversations`, nor `messages`.",
            advice='Write {"id": ..., "image": ..., "question": ..., "answer": ...}.',
        )
    if not all(isinstance(text, str) for _, text in said):
        raise InputError(f"{where} has a turn that is no text.", advice="Write text.")
    turns = [(_ROLES.get(str(role)), text) for role, text in said]
    turns = [turn for turn in turns if turn[0]]
    rounds = []
    for (first, question), (second, answer) in zip(turns[::2], turns[1::2], strict=False):
        if (first, second) != ("user", "assistant"):
            break  # out of order: nothing after this point is a question with its answer
        asked = _PLACEHOLDER.sub(" ", question).strip()
        if asked and answer.strip():
            rounds.append((asked, answer.strip()))
    return rounds


def _plain(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return " ".join(part["text"] for part in content if part.get("type") == "text")
