"""Pictures and prompts of the questions about several pictures: the first stage of MIA-DPO.

Which companions a target gets, and in which order, comes from a generator seeded with the run's
seed and the record's id (`data_tools.mia.planning`), so shards and resumed runs give the same
files.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from data_tools.mia import prompts
from data_tools.mia.layouts import MIN_INNER, Box, draw_grid, draw_inset, grid, inset
from data_tools.mia.planning import ComposeSettings, Plan, own_generator
from data_tools.mia.records import (
    COMPOSE,
    GRID,
    PIP,
    SEQUENCE,
    Instruction,
    check_instruction,
    stored_path,
)
from data_tools.pictures import Picture
from data_tools.records import Outcome
from mmlm.errors import ImageReadError
from mmlm.inputs import load_image

__all__ = ["Composer"]

OTHER_COMPANIONS = 5
"""How many others are tried for a companion that cannot be read."""
IMAGES = "images"


class _Failed(Exception):  # noqa: N818
    """One record cannot be made; the text is its status."""


class Composer:
    """The stage ``compose``: reads and draws pictures, writes instructions.

    Statuses: ``ok``; ``unreadable_image`` (the target), ``unreadable_companions`` (five others
    could not be read either, or there are none left), ``too_small`` (the inner picture would have
    a side below 28 pixels).

    Args:
        root: OUT; composed pictures go to ``OUT/compose/images``.
        planned: What is to be made.
        settings: As given to `plan`.
    """

    kinds = COMPOSE.kinds

    def __init__(self, root: Path, planned: Plan, settings: ComposeSettings) -> None:
        self._root = root
        self._pools = planned.pools
        self._settings = settings

    def process(self, records: Iterable[Mapping[str, Any]]) -> Iterator[Outcome]:
        """Composes one record after the other."""
        for record in records:
            start = time.perf_counter()
            try:
                line = self._compose(record)
            except _Failed as failed:
                yield Outcome(record["id"], str(failed), {}, time.perf_counter() - start)
                continue
            kind = COMPOSE.kinds[1 if record["refusal"] else 0]
            yield Outcome(record["id"], "ok", {kind: [line]}, time.perf_counter() - start)

    def _compose(self, record: Mapping[str, Any]) -> Instruction:
        format, n_images = record["format"], record["n_images"]
        generator = own_generator(self._settings.seed, record["id"])
        # The place is drawn first: it does not depend on which companions can be read. The
        # target of a picture within a picture is always the inner one, which is the second.
        place = generator.randrange(n_images) if format != PIP else 1
        try:
            target = Picture.read(record["id"], Path(record["image"]))
        except ImageReadError as error:
            raise _Failed("unreadable_image") from error
        pictures = self._companions(record, generator)
        pictures.insert(place, target)
        asked = n_images + 1 if record["refusal"] else place + 1
        images, boxes = self._shown(format, pictures)
        line: Instruction = {
            "id": record["id"],
            "format": format,
            "n_images": n_images,
            "images": [stored_path(self._root, path) for path in images],
            "target_index": asked,
            "tiles": [list(box) for box in boxes],
            "source_images": [stored_path(self._root, picture.path) for picture in pictures],
            "question": record["question"],
            "prompt_segments": prompts.segments(
                format, n_images, asked, record["question"], generator, self._settings.style
            ),
            "answer": _refusal(asked, n_images) if record["refusal"] else record["answer"],
            "seed": self._settings.seed,
            "source": record["source"],
        }
        if not record["refusal"]:
            check_instruction(line)
        return line

    def _companions(self, record: Mapping[str, Any], generator: random.Random) -> list[Picture]:
        pool = self._pools[record["pool"]]
        taken = {Path(record["image"])}
        found: list[Picture] = []
        while len(found) < record["n_images"] - 1:
            for _ in range(1 + OTHER_COMPANIONS):
                if len(taken) == len(pool):
                    raise _Failed("unreadable_companions")
                path = _draw(pool, taken, generator)
                try:
                    found.append(Picture.read(record["id"], path))
                except ImageReadError:
                    continue
                break
            else:
                raise _Failed("unreadable_companions")
        return found

    def _shown(self, format: str, pictures: Sequence[Picture]) -> tuple[list[Path], list[Box]]:
        """The pictures that the model is given, and the tiles of the composed one."""
        images = [picture.image for picture in pictures]
        if format == SEQUENCE:
            return [picture.path for picture in pictures], []
        if format == GRID:
            side = self._settings.tile
            layout = grid(len(images), (side, side), self._settings.margin)
            path = self._drawn(format, pictures, layout.size, lambda: draw_grid(images, layout))
            return [path], layout.boxes
        outer, inner = images
        place = inset(inner.size, outer.size)
        if min(place.size) < MIN_INNER:
            raise _Failed("too_small")
        path = self._drawn(format, pictures, outer.size, lambda: draw_inset(inner, outer, place))
        return [path], [(0, 0, *outer.size), place.box]

    def _drawn(
        self,
        format: str,
        pictures: Sequence[Picture],
        size: tuple[int, int],
        draw: Callable[[], Image.Image],
    ) -> Path:
        """The composed picture on the disk: the one that is there, if it is whole, else drawn."""
        settings = self._settings
        facts = [[one.sha256 for one in pictures], format, settings.seed, size, settings.margin]
        name = hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]
        suffix = ".png" if settings.picture_format == "png" else ".jpg"
        path = self._root / COMPOSE.name / IMAGES / name[:2] / f"{name}{suffix}"
        if not _is_whole(path, size):
            _save(draw(), path)
        return path


def _draw(pool: Sequence[Path], taken: set[Path], generator: random.Random) -> Path:
    """A picture that was not taken yet; it is taken then."""
    while (path := pool[generator.randrange(len(pool))]) in taken:
        pass
    taken.add(path)
    return path


def _refusal(asked: int, n_images: int) -> str:
    return f"There is no Image{asked}; only {n_images} images are given."


def _is_whole(path: Path, size: tuple[int, int]) -> bool:
    if not path.exists():
        return False
    try:
        return load_image(path).size == size
    except ImageReadError:
        return False


def _save(image: Image.Image, path: Path) -> None:
    """Writes a picture so that it is either whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if path.suffix == ".jpg" else {}
    try:
        with temporary.open("wb") as stream:
            image.save(stream, "JPEG" if options else "PNG", **options)
            stream.flush()
            os.fsync(stream.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
