"""What the stages of MIA-DPO leave on the disk, and how the next one reads it.

Everything of one run lies under one folder, each stage in its own (`data_tools.records`)::

    OUT/compose/instructions.jsonl       compose:  `Instruction`; its pictures in compose/images/
    OUT/compose/refusals.jsonl           compose:  the same, for a picture that is not there
    OUT/answer/answers.jsonl             answer:   `Answer`
    OUT/score/scores.jsonl               score:    `Score`
    OUT/filter/pairs.jsonl               filter:   `Pair`
    OUT/filter/dropped.jsonl             filter:   `Pair` with the `reason`
    OUT/pairs.jsonl                      merge:    all pairs, shuffled

A record keeps its ``id`` through all stages, so that a shard (``crc32(id) mod n``) stays a shard,
and a stage takes the lines of the stages before it joined by ``id`` into one record: answer gets
an `Instruction`, score an `Instruction` with the fields of its `Answer`, filter these two with the
`Score`. Whoever has no line of one kind (a picture that cannot be read, a prompt that is too long)
is no record of the next stage; its status in ``done.jsonl`` says why.

Paths of pictures are relative to OUT if they lie in it, and absolute otherwise: two runs with one
seed are equal to the byte wherever they are. `locate` turns them into paths of this machine.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NotRequired, TypedDict

from data_tools.done import DONE, WHOLE, read_kind
from mmlm.errors import InputError
from mmlm.sharding import Shard

__all__ = [
    "ALLOWED",
    "ANSWER",
    "COMPOSE",
    "FILTER",
    "GRID",
    "PAIRS",
    "PIP",
    "SCORE",
    "SEQUENCE",
    "STEPS",
    "Answer",
    "Instruction",
    "Pair",
    "Score",
    "Segment",
    "Step",
    "check_instruction",
    "check_number",
    "joined",
    "locate",
    "shuffled",
    "stored_path",
]

SEQUENCE, GRID, PIP = "sequence", "grid", "pip"
ALLOWED: Mapping[str, tuple[int, ...]] = {SEQUENCE: (2, 3, 4, 5), GRID: (2, 3, 4, 6, 9), PIP: (2,)}
"""Formats and the numbers of source pictures that each is defined for."""
PAIRS = "pairs.jsonl"
"""The file of all pairs, shuffled, in OUT."""


class Step(NamedTuple):
    """A stage and what it writes.

    Attributes:
        name: Its folder under OUT, and the name of its command.
        kinds: Its files; the first has one line per record that goes on.
    """

    name: str
    kinds: tuple[str, ...]


COMPOSE = Step("compose", ("instructions", "refusals"))
ANSWER = Step("answer", ("answers",))
SCORE = Step("score", ("scores",))
FILTER = Step("filter", ("pairs", "dropped"))
STEPS = (COMPOSE, ANSWER, SCORE, FILTER)


class Segment(TypedDict):
    """A part of a prompt, as Hugging Face chat messages have it: text, or the next picture."""

    type: str
    text: NotRequired[str]


class Instruction(TypedDict):
    """A question about one of several pictures (kind ``instructions``).

    Lines of the kind ``refusals`` have the same form, but ask for a picture that is not there
    (``target_index`` is ``n_images + 1``); they go no further and never become pairs.

    Attributes:
        id: ``SOURCE-sequence3``: the source record, the format, the number of pictures.
        format: ``sequence`` (several pictures), ``grid`` (a collage) or ``pip`` (a picture within
            a picture); the last two are one composed picture.
        n_images: Number of source pictures.
        images: What the model is shown, in the order of the prompt's image segments.
        target_index: 1-based place, in ``source_images`` and ``tiles``, of the picture that the
            question is about. Never parsed from a text.
        tiles: ``[x0, y0, x1, y1]`` per source picture, in pixels of the composed one, the right
            and lower border excluded. A grid's tile is the whole cell without its label; of a
            picture within a picture the first tile is all of it, the second the inner one.
            Empty for a sequence.
        source_images: The source pictures, in order.
        question: The source's question, unchanged.
        prompt_segments: The user's turn: text and images in order.
        answer: The source's answer: what will be chosen.
        seed: Seed of the run.
        source: The source set that all of its pictures come from.
    """

    id: str
    format: str
    n_images: int
    images: list[str]
    target_index: int
    tiles: list[list[int]]
    source_images: list[str]
    question: str
    prompt_segments: list[Segment]
    answer: str
    seed: int
    source: str


class Answer(TypedDict):
    """What the model answered (kind ``answers``).

    Attributes:
        id: The record.
        response: Its answer, decoded without special tokens, blanks around it removed; may be "".
        n_tokens: Generated tokens, the closing one included.
        corrupt_target: Standard deviation, in grey levels, of the noise laid over the target's
            tile for this answer; None without noise (the default).
        model: What answered.
        decode: How: greedy or sampled, number of new tokens and so on.
        tokens: Ids of the generated tokens; a response from elsewhere is tokenised when scored.
        prompt_tokens: Length of the prompt.
        log_max: Mean log-probability of the most probable token of every step.
        attention: What was measured while answering: the ``layer``, and by both rules ``ratios``
            and ``parity``; None where there are none.
    """

    id: str
    response: str
    n_tokens: int
    corrupt_target: float | None
    model: str
    decode: Mapping[str, Any]
    tokens: NotRequired[list[int]]
    prompt_tokens: NotRequired[int]
    log_max: NotRequired[float]
    attention: NotRequired[Mapping[str, Any]]


class Score(TypedDict):
    """Where the model looked, and how sure it was (kind ``scores``).

    Attributes:
        id: The record.
        ratio: Share of the target, in [0, 1], of the attention on all pictures; None if there is
            none (no attention on any picture, or no token to look from).
        ratios: The same for every place: entry ``target_index - 1`` is ``ratio``; [] if None.
        ppl: Perplexity of the response; None if it is empty.
        layer: 0-based decoder layer of the attention.
    """

    id: str
    ratio: float | None
    ratios: list[float]
    ppl: float | None
    layer: int


class Pair(TypedDict):
    """A preference, or with a ``reason`` what did not become one (``pairs``, ``dropped``).

    Both kinds hold the same numbers, so that other thresholds need no other generation.

    Attributes:
        id: The record.
        images: What the model is shown.
        prompt: Text and images in order.
        chosen: The source's answer.
        rejected: The model's answer.
        ratio: Share of attention on the target; None if there is none.
        ratios: The same for every place.
        ppl: Perplexity of ``rejected``; None if it is empty.
        len_ratio: Words of ``rejected`` per word of ``chosen``; None if one of them has no word.
        edit_distance: Levenshtein distance over the greater length, in [0, 1], of both in lower
            case.
        format: As in the instruction.
        n_images: Number of source pictures.
        target_index: 1-based place of the target.
        meta: ``model``, ``layer``, ``thresholds``, ``corrupt_target``, ``decode``.
        reason: The first filter that it did not pass; in ``dropped`` only.
    """

    id: str
    images: list[str]
    prompt: list[Segment]
    chosen: str
    rejected: str
    ratio: float | None
    ratios: list[float]
    ppl: float | None
    len_ratio: float | None
    edit_distance: float
    format: str
    n_images: int
    target_index: int
    meta: Mapping[str, Any]
    reason: NotRequired[str]


def check_number(format: str, n_images: int) -> None:
    """Refuses a format that does not exist, or a number of pictures that it is not defined for.

    Raises:
        ValueError: Names what is allowed.
    """
    if format not in ALLOWED:
        raise ValueError(f"format must be one of {', '.join(ALLOWED)}, got {format!r}")
    if n_images not in ALLOWED[format]:
        allowed = ", ".join(map(str, ALLOWED[format]))
        raise ValueError(f"{format} is made of {allowed} pictures, got {n_images}")


def check_instruction(record: Mapping[str, Any]) -> None:
    """Refuses an instruction that contradicts itself.

    Raises:
        ValueError: If the image segments are not as many as the pictures (says both numbers), the
            format is not defined for this number, or the target is none of the pictures.
    """
    name, n_images = record["id"], len(record["images"])
    check_number(record["format"], record["n_images"])
    places = sum(segment["type"] == "image" for segment in record["prompt_segments"])
    if places != n_images:
        raise ValueError(f"{name}: the prompt has {places} image segments for {n_images} images")
    if not 1 <= record["target_index"] <= record["n_images"]:
        raise ValueError(
            f"{name}: target_index must be from 1 to {record['n_images']}, "
            f"got {record['target_index']}"
        )
    tiles = 0 if record["format"] == SEQUENCE else record["n_images"]
    if len(record["tiles"]) != tiles:
        raise ValueError(f"{name}: {tiles} tiles are needed, got {len(record['tiles'])}")


def locate(root: Path, stored: str) -> Path:
    """The file behind a stored path: relative ones start at OUT."""
    return root / stored


def stored_path(root: Path, path: Path) -> str:
    """How a path is stored: relative to OUT if it lies in it, else absolute."""
    absolute, base = path.absolute(), root.absolute()
    return absolute.relative_to(base).as_posix() if absolute.is_relative_to(base) else str(absolute)


def joined(root: Path, steps: Sequence[Step], shard: Shard = WHOLE) -> list[dict[str, Any]]:
    """The records that have a line of every given stage, their fields put together.

    A shard reads what the same shard of the stages before has written, or its part of a stage
    that is whole: all of them divide the records by the same rule.

    Args:
        root: OUT.
        steps: The stages in order, `COMPOSE` first; of each its first kind is read.
        shard: Which part.

    Returns:
        Sorted by ``id``.

    Raises:
        InputError: If a stage has not been run, or only in shards that must be merged first.
    """
    records: dict[str, dict[str, Any]] = {}
    for number, step in enumerate(steps):
        lines = {line["id"]: line for line in _lines(root, step, shard) if shard.owns(line["id"])}
        if number == 0:
            records = lines
        else:
            records = {key: records[key] | line for key, line in lines.items() if key in records}
    return [records[key] for key in sorted(records)]


def _lines(root: Path, step: Step, shard: Shard) -> Iterable[dict[str, Any]]:
    folder = root / step.name
    part = shard if shard.path(folder / f"{DONE}.jsonl").exists() else WHOLE
    if not part.path(folder / f"{DONE}.jsonl").exists():
        in_shards = any(folder.glob(f"{DONE}.shard-*.jsonl"))
        raise InputError(
            f"{str(folder)!r} is " + ("there in shards only." if in_shards else "not there yet."),
            advice=f"Put them together: mmlm data mia merge {root}"
            if in_shards
            else f"Run the stage before this one: mmlm data mia {step.name}",
        )
    return (line for _, lines in read_kind(folder, step.kinds[0], part) for line in lines)


def shuffled(lines: Iterable[Mapping[str, Any]], seed: int) -> list[Mapping[str, Any]]:
    """Lines in an order that depends on their ids and the seed only, however they came.

    Args:
        lines: Lines with an ``id`` each.
        seed: Another seed, another order.
    """

    def key(line: Mapping[str, Any]) -> bytes:
        return hashlib.sha256(f"{seed}\0{line['id']}".encode()).digest()

    return sorted(lines, key=key)
