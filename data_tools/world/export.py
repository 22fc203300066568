"""Writing a split to disk in the forms that the usual tools read.

    images/000001.png ...       the pictures
    instances.json              COCO: official category ids, boxes, masks of the visible parts
    captions.json               COCO: five true descriptions of each picture
    pope_random.jsonl           POPE questions; also _popular and _adversarial
    conversations.jsonl         chat messages for training; see `conversations`
    world.json                  what was asked for; written first

A run that was stopped goes on where it was; equal requests give equal bytes.
"""

from __future__ import annotations

import io
import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data_tools.world.categories import CATEGORIES, SUPERCATEGORIES
from data_tools.world.language import CAPTION_QUESTIONS, caption, questions
from data_tools.world.painting import render
from data_tools.world.polling import KINDS, poll
from data_tools.world.scenes import SPLITS, Scene, WorldConfig, scene, stream
from mmlm.errors import InputError
from mmlm.progress import tracked

FORMAT = 1
"""Raised whenever equal requests would give other bytes than before."""
CAPTIONS_PER_PICTURE = 5
QUESTIONS_PER_PICTURE = 5
_CAPTION_STREAM, _CONVERSATION_STREAM = 2, 4
RUN_RECORD = "world.json"
LICENSES: list[dict[str, Any]] = [
    {"id": 1, "name": "Noto Emoji, Google: Apache-2.0", "styles": ["noto"],
     "url": "https://github.com/googlefonts/noto-emoji"},
    {"id": 2, "name": "Fluent Emoji, Microsoft: MIT", "styles": ["fluent_flat", "fluent_3d"],
     "url": "https://github.com/microsoft/fluentui-emoji"},
    {"id": 3, "name": "Twemoji, Twitter, Inc and other contributors: CC BY 4.0",
     "styles": ["twemoji"], "url": "https://github.com/jdecked/twemoji"},
]  # fmt: skip


class Summary(NamedTuple):
    """What a folder holds after `write_split`."""

    output: Path
    pictures: int
    objects: int
    questions: int
    """POPE questions of each kind."""


def write_split(
    output: str | Path,
    split: str,
    count: int,
    seed: int = 0,
    progress: bool = True,
    *,
    first: int = 0,
) -> Summary:
    """Write pictures, truth, captions, POPE questions and conversations of a split.

    Args:
        output: Folder; new, empty, or left by a run with the same arguments, which is continued.
        split: A key of `SPLITS`.
        count: Number of pictures, at least 1.
        seed: Seed, not negative.
        progress: Show a progress bar on standard error.
        first: Number of the first scene, not negative; files and ids are numbered from it.

    Returns:
        What was written.

    Raises:
        InputError: An argument is out of range, or the folder holds something else. Nothing has
            been written then.
    """
    config = _check(split, count, seed, first)
    folder = Path(output)
    request = {"format": FORMAT, "split": split, "count": count, "seed": seed,
               "config": asdict(config)}  # fmt: skip
    _claim(folder, request | ({"first": first} if first else {}))
    (folder / "images").mkdir(exist_ok=True)
    scenes: list[Scene] = []
    annotations: list[str] = []
    for index in tracked(range(first, first + count), progress, f"scenes of {split}"):
        truth = scene(config, seed, index, split)
        picture = render(truth)
        path = folder / "images" / file_name(index)
        if not path.exists():
            _replace(path, _png(picture.image))
        for record in _annotations(truth, picture.instance_map, index + 1, len(annotations)):
            annotations.append(json.dumps(record, separators=(",", ":")))
        scenes.append(truth)
    named = [(s, file_name(s.index)) for s in scenes]
    polled = {kind: poll(kind, named) for kind in KINDS}
    _replace(folder / "captions.json", _captions(scenes))
    for kind, asked in polled.items():
        _replace(folder / f"pope_{kind}.jsonl", _lines(asked))
    _replace(folder / "conversations.jsonl", _lines(r for s in scenes for r in conversations(s)))
    _replace(folder / "instances.json", _instances(scenes, annotations))
    return Summary(folder, count, len(annotations), len(polled["random"]))


def file_name(index: int) -> str:
    """File name of a scene's picture; COCO ids start at 1."""
    return f"{index + 1:06d}.png"


def conversations(truth: Scene) -> list[dict[str, Any]]:
    """Two chat records about a picture: one asks for a caption, one goes through questions.

    Each record has `id`, `image` (relative to the folder) and `messages` in the form of Hugging
    Face chat templates, the picture in the first message. `scene.config.label_noise` applies.
    """
    rng = stream(truth.split, truth.seed, truth.index, _CONVERSATION_STREAM)
    ask = CAPTION_QUESTIONS[int(rng.random() * len(CAPTION_QUESTIONS))]
    rounds = {
        "caption": [(ask, caption(truth, rng))],
        "questions": questions(truth, rng, QUESTIONS_PER_PICTURE),
    }
    name = file_name(truth.index)
    return [
        {"id": f"{name[:-4]}-{kind}", "image": f"images/{name}", "messages": _messages(turns)}
        for kind, turns in rounds.items()
    ]


def _messages(turns: list[tuple[str, str]]) -> list[dict[str, Any]]:
    messages: list[dict[str, Any]] = []
    for question, answer in turns:
        content = [{"type": "text", "text": question}]
        if not messages:
            content.insert(0, {"type": "image"})
        messages.append({"role": "user", "content": content})
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
    return messages


def _check(split: str, count: int, seed: int, first: int) -> WorldConfig:
    if split not in SPLITS:
        raise InputError(
            f"There is no split {split!r}.", advice=f"Choose one of {', '.join(SPLITS)}."
        )
    if count < 1:
        raise InputError(f"{count} pictures were asked for.", advice="Ask for at least 1.")
    if seed < 0:
        raise InputError(f"The seed is {seed}.", advice="Give a seed of 0 or more.")
    if first < 0:
        raise InputError(f"The first scene is {first}.", advice="Scenes are counted from 0.")
    return SPLITS[split]


def _claim(folder: Path, request: dict[str, Any]) -> None:
    """Make the folder ours, or refuse it."""
    text = json.dumps(request, indent=2) + "\n"
    record = folder / RUN_RECORD
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{str(folder)!r} is a file.", advice="Give a folder as output.")
    if record.exists():
        if record.read_text("utf-8") != text:
            raise InputError(
                f"{str(folder)!r} holds the output of another run (see {RUN_RECORD}).",
                advice="Choose a new folder, or repeat the arguments of that run to continue it.",
            )
        return
    if folder.exists() and any(p.name != _part(record).name for p in folder.iterdir()):
        raise InputError(
            f"{str(folder)!r} is not empty and was not written by this command.",
            advice="Choose a new or empty folder.",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _replace(record, text.encode())
    except OSError as error:
        raise InputError(
            f"{str(folder)!r} cannot be written: {error.strerror}.",
            advice="Choose a folder that you may write to.",
        ) from error


def _part(path: Path) -> Path:
    return path.with_name(path.name + ".part")


def _replace(path: Path, content: bytes) -> None:
    """Write a file so that it is either complete or not there."""
    part = _part(path)
    part.write_bytes(content)
    os.replace(part, path)


def _png(image: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG")
    return buffer.getvalue()


def _lines(records: Iterable[Any]) -> bytes:
    return "".join(json.dumps(record) + "\n" for record in records).encode()


def _annotations(
    truth: Scene, instance_map: NDArray[np.uint8], image_id: int, before: int
) -> Iterator[dict[str, Any]]:
    """COCO annotations of a picture; ids go on after the `before` earlier ones."""
    for number, instance in enumerate(truth.instances, start=1):
        mask = instance_map == number
        yield {
            "id": before + number,
            "image_id": image_id,
            "category_id": CATEGORIES[instance.category][0],
            "bbox": list(instance.box),
            "area": int(mask.sum()),
            "segmentation": {"size": list(mask.shape), "counts": run_lengths(mask)},
            "iscrowd": 0,
        }


def run_lengths(mask: NDArray[np.bool_]) -> list[int]:
    """COCO's uncompressed run-length code: columns one after the other, first run is background."""
    flat = mask.T.ravel()
    borders = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    runs = np.diff(np.concatenate(([0], borders, [flat.size]))).tolist()
    return [0, *runs] if flat[0] else runs


def _head(scenes: list[Scene]) -> dict[str, Any]:
    first = scenes[0]
    return {
        "info": {
            "description": f"mmlm embedded world, split {first.split}, seed {first.seed}",
            "version": str(FORMAT),
        },
        "licenses": LICENSES,
        "images": [
            {
                "id": s.index + 1,
                "file_name": file_name(s.index),
                "width": s.config.size,
                "height": s.config.size,
                "license": next(li["id"] for li in LICENSES if s.style in li["styles"]),
                "theme": s.theme,
                "style": s.style,
            }
            for s in scenes
        ],
    }


def _captions(scenes: list[Scene]) -> bytes:
    """True captions, whatever the label noise: they count as truth in CHAIR."""
    annotations: list[dict[str, Any]] = []
    for s in scenes:
        truth = replace(s, config=replace(s.config, label_noise=0.0))
        rng = stream(s.split, s.seed, s.index, _CAPTION_STREAM)
        for _ in range(CAPTIONS_PER_PICTURE):
            annotations.append(
                {
                    "id": len(annotations) + 1,
                    "image_id": s.index + 1,
                    "caption": caption(truth, rng),
                }
            )
    return (json.dumps(_head(scenes) | {"annotations": annotations}) + "\n").encode()


def _instances(scenes: list[Scene], annotations: list[str]) -> bytes:
    """The annotations come encoded: as text they take a fraction of the memory."""
    categories = [
        {"id": CATEGORIES[i][0], "name": CATEGORIES[i][1], "supercategory": group}
        for group, first, end in SUPERCATEGORIES
        for i in range(first, end)
    ]
    head = json.dumps(_head(scenes) | {"categories": categories})
    return (head[:-1] + ', "annotations": [\n' + ",\n".join(annotations) + "\n]}\n").encode()
